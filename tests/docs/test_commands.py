"""
Commands of README and docs run in bash as they stand, and so does each recipe of the quickstart, where a user has the
quickstart's model and data: here a tiny model and few rows. Some are run by `.ci/run` itself, and launches on several
processes by `tests/matrix/test_processes.py`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import LAUNCH, STRATEGIES
from huggingface_hub import ModelCard
from test_code_blocks import ROOT, blocks, texts

from hf_sft_variants import SFTGOConfig, SFTGOTrainer, recipe
from hf_sft_variants.cli import main
from hf_sft_variants.quickstart import build_splits, write_data
from hf_sft_variants.quickstart.data import tagged_splits


CI = (ROOT / ".ci" / "run").read_text()
RECIPES = sorted(path.relative_to(ROOT) for path in ROOT.glob("recipes/quickstart/*.yaml"))
LAUNCHES = [LAUNCH.format(strategy) for strategy in STRATEGIES]
FOR_CI_ONLY = ("make", "pip")  # they change the checkout or the environment
SMALL = {
    "python benchmarks/poft_corrupted_answers.py": "--seeds 1 --train_size 16",
    "python benchmarks/poft_reference_memory.py": "--references quickstart/model",
    "python benchmarks/step_overhead.py": "--methods sft_go --length 32 --pairs 1 --warm_up 0",
}
TAGS = {"sft_go": "sft-go", "sftkey": "sftkey", "poft": "poft", "sftmix": "sftmix"}
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# CI has it, and fails without
NEEDS_COMMAND = pytest.mark.skipif(
    shutil.which("hf-sft-variants", path=PATH) is None and "CI" not in os.environ,
    reason="hf-sft-variants is not installed: pip install -e .",
)


def commands_of(code: str) -> list[str]:
    """Lines of the shell, those that end in a backslash joined with the next, without comments."""
    lines = re.sub(r"(^|\s)#.*", "", code.replace("\\\n", " "), flags=re.MULTILINE).split("\n")
    return [" ".join(line.split()) for line in lines if line.strip()]


def head_of(path: Path) -> list[str]:
    """The commands that a recipe names in its first lines."""
    return re.findall(r"^# +(trl sft .+)$", (ROOT / path).read_text(), re.MULTILINE)


def named(program: str) -> list[str]:
    """Commands inside sentences and tables, without the names of programs alone."""
    pages = [re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE) for text in texts().values()]
    spans = {" ".join(span.split()) for page in pages for span in re.findall(r"`([^`]+)`", page)}
    return sorted(span for span in spans if span.startswith(f"{program} "))


def all_sequences() -> list[list[str]]:
    """Commands that are run one after the other: those of a block, and of blocks that begin with the same one."""
    sequences = {}
    for commands in [*(commands_of(block.values[0]) for block in blocks("bash")), *map(head_of, RECIPES)]:
        sequence = sequences.setdefault(commands[0], [])
        sequence += [command for command in commands if command not in sequence]
    for command in reversed(named("python")):  # the longer ones first
        if not any(other.startswith(command) for sequence in sequences.values() for other in sequence):
            sequences[command] = [command]
    return [*sequences.values()]


def is_run_by_ci(command: str) -> bool:
    """Whether it is a line of `.ci/run`, where more flags may follow."""
    return re.search(rf'^(?: +|stage ".*" ){re.escape(command)}(?: .*)?$', CI, re.MULTILINE) is not None


def sequences_to_run() -> list:
    parameters = []
    for sequence in all_sequences():
        sequence = [command for command in sequence if not is_run_by_ci(command) and command not in LAUNCHES]
        if sequence and not sequence[0].startswith(FOR_CI_ONLY):
            marks = [NEEDS_COMMAND] if any(command.startswith("hf-sft-variants") for command in sequence) else []
            parameters.append(pytest.param(sequence, id=sequence[0], marks=marks))
    return parameters


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, tiny_model_factory, tokenizer) -> Path:
    """What `hf-sft-variants quickstart` writes, beside the repository's files, and a recipe whose run was killed."""
    folder = tmp_path_factory.mktemp("commands")
    splits = build_splits(train_size=24, test_size=4)
    write_data(folder / "quickstart" / "data", splits)
    write_data(folder / "quickstart" / "tagged_data", tagged_splits(splits))
    tiny_model_factory().save_pretrained(folder / "quickstart" / "model")
    tokenizer.save_pretrained(folder / "quickstart" / "model")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    for scripts in ("benchmarks", "docs/images"):
        shutil.copytree(ROOT / scripts, folder / scripts, ignore=shutil.ignore_patterns("*.json", "*.svg"))
    keys = yaml.safe_load((ROOT / "recipes" / "quickstart" / "sft_go.yaml").read_text())
    keys |= {"output_dir": "quickstart/runs/sft_go_own", "save_strategy": "steps", "save_steps": 1}
    (folder / "RECIPE.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        recipe.main(SFTGOTrainer, SFTGOConfig, ["--config", "RECIPE.yaml", "--max_steps", "1"])
    return folder


@pytest.mark.parametrize("sequence", sequences_to_run())
def test_commands(sequence, quickstart, tmp_path):
    folder = shutil.copytree(quickstart, tmp_path / "folder", symlinks=True)
    script = "\n".join(sequence)
    for command, flags in SMALL.items():
        script = re.sub(rf"^{re.escape(command)}.*", rf"\g<0> {flags}", script, flags=re.MULTILINE)
    finished = subprocess.run(
        ["bash", "-exc", script],
        cwd=folder,
        env={
            **os.environ,
            "PATH": PATH,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "HF_HOME": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-10_000:]
    for config in re.findall(r"(?:trl sft|-m [\w.]+) --config (\S+)", script):
        assert_trained(folder / yaml.safe_load((folder / config).read_text())["output_dir"])


def assert_trained(output: Path) -> None:
    """An adapter, by the method that its folder is named after."""
    assert (output / "adapter_model.safetensors").is_file()
    tags = {*ModelCard.load(output / "README.md").data.tags} & {*TAGS.values()}
    assert tags == {tag for method, tag in TAGS.items() if output.name.startswith(method)}


def test_each_recipe_of_the_quickstart_is_started_by_trl():
    commands = {command for sequence in all_sequences() for command in sequence}
    assert commands >= {f"trl sft --config {path}" for path in RECIPES}


def test_what_changes_the_environment_is_run_by_ci():
    for command in [command for sequence in [*all_sequences(), named("make")] for command in sequence]:
        assert not command.startswith(FOR_CI_ONLY) or is_run_by_ci(command), command


@pytest.mark.parametrize("command", named("hf-sft-variants"))
def test_flags_of_a_named_command(command, capsys):
    """Some of these lack a model, or need the Hub."""
    _, subcommand, *words = command.split()
    with pytest.raises(SystemExit, match="0"):
        main([subcommand, "--help"])
    assert {word for word in words if word.startswith("--")} <= {*re.findall(r"--[\w-]+", capsys.readouterr().out)}
