"""
The commands in README and docs and the quickstart recipes run unchanged, with a tiny model and few rows in place of
the quickstart's. `.ci/run` itself runs some of them, and `tests/matrix/test_processes.py` those on several processes.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import yaml
from helpers import LAUNCH, STRATEGIES
from huggingface_hub import ModelCard
from test_code_blocks import ROOT, blocks, texts

from hf_sft_variants import SFTGOConfig, SFTGOTrainer
from hf_sft_variants.cli import main
from hf_sft_variants.launch import recipe
from hf_sft_variants.quickstart import build_splits, write_data
from hf_sft_variants.quickstart.data import tagged_splits


CI = (ROOT / ".ci" / "run").read_text()
RECIPES = sorted(path.relative_to(ROOT) for path in ROOT.glob("recipes/quickstart/*.yaml"))
LAUNCHES = [LAUNCH.format(strategy) for strategy in STRATEGIES]
FOR_CI_ONLY = ("make", "pip")  # these change the checkout or the environment
SMALL = {
    "hf-sft-variants compare": "--jobs 2",
    "hf-sft-variants score --config recipes/quickstart/poft.yaml": "--reference_models quickstart/model",
    "python benchmarks/poft_corrupted_answers.py": "--seeds 1 --train_size 16",
    "python benchmarks/poft_reference_memory.py": "--references quickstart/model",
    "python benchmarks/step_overhead.py": "--methods sft_go --length 32",
}
TAGS = {"sft_go": "sft-go", "sftkey": "sftkey", "poft": "poft", "sftmix": "sftmix"}
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# Never skipped in CI, where it is installed
NEEDS_COMMAND = pytest.mark.skipif(
    shutil.which("hf-sft-variants", path=PATH) is None and "CI" not in os.environ,
    reason="hf-sft-variants is not installed: pip install -e .",
)


def commands_of(code: str) -> list[str]:
    """Shell lines without comments; a line that ends in a backslash is joined with the next."""
    lines = re.sub(r"(^|\s)#.*", "", code.replace("\\\n", " "), flags=re.MULTILINE).split("\n")
    return [" ".join(line.split()) for line in lines if line.strip()]


def head_of(path: Path) -> list[str]:
    """The commands in the first lines of a recipe."""
    return re.findall(r"^# +(trl sft .+)$", (ROOT / path).read_text(), re.MULTILINE)


def named(program: str) -> list[str]:
    """Commands in sentences and tables; the name of a program alone does not count."""
    pages = [re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE) for text in texts().values()]
    spans = {" ".join(span.split()) for page in pages for span in re.findall(r"`([^`]+)`", page)}
    return sorted(span for span in spans if span.startswith(f"{program} "))


def all_sequences() -> list[list[str]]:
    """Commands to run in order: those of one block, or of several blocks that start with the same command."""
    sequences = {}
    of_blocks = [commands_of(block.values[0]) for block in blocks("bash")]
    for commands in filter(None, [*of_blocks, *map(head_of, RECIPES)]):
        sequence = sequences.setdefault(commands[0], [])
        sequence += [command for command in commands if command not in sequence]
    return [*sequences.values()]


def all_commands() -> list[str]:
    return [command for sequence in all_sequences() for command in sequence]


def named_programs() -> list[str]:
    """Python commands in sentences and tables, in the form with the most flags, except those in blocks."""
    commands = [*all_commands(), *named("python")]
    return [command for command in named("python") if sum(other.startswith(command) for other in commands) == 1]


def is_run_by_ci(command: str) -> bool:
    """Whether it is a line of `.ci/run`, possibly with more flags."""
    return re.search(rf'^(?: +|stage ".*" ){re.escape(command)}(?: .*)?$', CI, re.MULTILINE) is not None


def sequences_to_run() -> list:
    parameters = []
    for sequence in all_sequences():
        elsewhere = [command for command in sequence if is_run_by_ci(command) or command in LAUNCHES]
        sequence = [c for c in sequence if c not in elsewhere and not c.startswith(FOR_CI_ONLY)]
        marks = [NEEDS_COMMAND] if any(command.startswith("hf-sft-variants") for command in sequence) else []
        if sequence:
            parameters.append(pytest.param(sequence, id=sequence[0], marks=marks))
    return parameters


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, tiny_model_factory, tokenizer) -> Path:
    """The output of `hf-sft-variants quickstart`, the repository's files, and a recipe with a run to resume."""
    folder = tmp_path_factory.mktemp("commands")
    splits = build_splits(train_size=24, test_size=4)
    write_data(folder / "quickstart" / "data", splits)
    write_data(folder / "quickstart" / "tagged_data", tagged_splits(splits))
    tiny_model_factory().save_pretrained(folder / "quickstart" / "model")
    tokenizer.save_pretrained(folder / "quickstart" / "model")
    for name in ("recipes", "studies"):
        (folder / name).symlink_to(ROOT / name)
    for written in ("benchmarks", "docs"):  # by the scripts in them
        shutil.copytree(ROOT / written, folder / written, ignore=shutil.ignore_patterns("_build", "notebooks"))
    shutil.copy(ROOT / "README.md", folder)
    keys = yaml.safe_load((ROOT / "recipes" / "quickstart" / "sft_go.yaml").read_text())
    keys |= {"output_dir": "quickstart/runs/sft_go_own", "save_strategy": "steps", "save_steps": 1}
    (folder / "RECIPE.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        recipe.main(SFTGOTrainer, SFTGOConfig, ["--config", "RECIPE.yaml", "--max_steps", "1"])
    return folder


@pytest.fixture
def folder(quickstart, tmp_path) -> Path:
    return shutil.copytree(quickstart, tmp_path / "folder", symlinks=True)


def made_small(command: str) -> str:
    return " ".join([command, *(flags for start, flags in SMALL.items() if command.startswith(start))])


@pytest.mark.parametrize("sequence", sequences_to_run())
def test_commands(sequence, folder):
    finished = subprocess.run(
        ["bash", "-exc", "\n".join(map(made_small, sequence))],
        cwd=folder,
        env={
            **os.environ,
            "PATH": PATH,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "HF_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-10_000:]
    for config in re.findall(r"(?:trl sft|-m [\w.]+) --config (\S+)", "\n".join(sequence)):
        assert_trained(folder / yaml.safe_load((folder / config).read_text())["output_dir"])


def assert_trained(output: Path) -> None:
    """An adapter is there, trained by the method that its folder is named after."""
    assert (output / "adapter_model.safetensors").is_file()
    tags = {*ModelCard.load(output / "README.md").data.tags} & {*TAGS.values()}
    assert tags == {tag for method, tag in TAGS.items() if output.name.startswith(method)}


@pytest.mark.parametrize("command", named_programs())
def test_named_program(command, folder, monkeypatch):
    """Runs in this process, where everything is already imported."""
    monkeypatch.chdir(folder)
    _, *words = made_small(command).split()
    run = runpy.run_path
    if words[0] == "-m":
        run = partial(runpy.run_module, alter_sys=True)
        del words[0]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="0") if "--help" in words else nullcontext():
        run(words[0], run_name="__main__")


@pytest.mark.parametrize("command", named("hf-sft-variants"))
def test_named_command(command, folder, monkeypatch, capsys):
    """With a recipe, it runs. Otherwise it would need a model or the Hub, so only its flags are checked."""
    monkeypatch.chdir(folder)
    _, subcommand, *words = made_small(command).split()
    if "--config" in words:
        assert main([subcommand, *words]) == 0
    else:
        with pytest.raises(SystemExit, match="0"):
            main([subcommand, "--help"])
        flags = {word for word in words if word.startswith("--")}
        assert flags <= {*re.findall(r"--[\w-]+", capsys.readouterr().out)}


def test_each_recipe_of_the_quickstart_is_started_by_trl():
    assert {*all_commands()} >= {f"trl sft --config {path}" for path in RECIPES}


def test_what_changes_the_environment_is_run_by_ci():
    for command in [*all_commands(), *named("make")]:
        assert not command.startswith(FOR_CI_ONLY) or is_run_by_ci(command), command
