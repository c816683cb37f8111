"""
Commands of README and docs run as they are written, and so does each recipe of the quickstart, where a user has the
quickstart's model and data: here a tiny model and few rows, in this process, where everything is imported.

Some are run by `.ci/run` itself, launches on several processes by `tests/matrix/test_processes.py` and
`tests/distributed/test_slurm.py`, and the studies' arms by `tests/comparison/test_committed_studies.py`.
"""

import re
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from shlex import split
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from helpers import LAUNCH, SBATCH, STRATEGIES
from huggingface_hub import ModelCard
from launches import launch_of_trl, start
from methods import METHODS
from test_code_blocks import ROOT, blocks, texts

from hf_sft_variants.cli import main
from hf_sft_variants.comparison import plan_runs, read_study
from hf_sft_variants.launch import training
from hf_sft_variants.quickstart import build_splits, write_data
from hf_sft_variants.quickstart.data import tagged_splits
from hf_sft_variants.scoring import cached_scores


CI = (ROOT / ".ci" / "run").read_text()
RECIPES = sorted(path.relative_to(ROOT) for path in ROOT.glob("recipes/quickstart/*.yaml"))
LAUNCHES = [SBATCH, *(LAUNCH.format(strategy) for strategy in STRATEGIES)]
FOR_CI_ONLY = ("make", "pip")  # these change the checkout or the environment
SMALL = {
    "hf-sft-variants score --config recipes/quickstart/poft.yaml": "--reference_models quickstart/model",
    "python benchmarks/poft_corrupted_answers.py": "--seeds 1 --train_size 16",
    "python benchmarks/poft_reference_memory.py": "--references quickstart/model",
    "python benchmarks/scoring_throughput.py": "--examples 16 --repeats 1",
    "python benchmarks/lm_head.py": "--rows 16 --vocab_sizes 512 --rounds 2 --warm_up 0",
    "python benchmarks/step_overhead.py": "--methods sft_go --pairs 2 --warm_up 1 --batch_size 1",
}
TAGS = {"sft_go": "sft-go", "sftkey": "sftkey", "poft": "poft", "sftmix": "sftmix", "weighted": "weighted"}


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
        if sequence:
            parameters.append(pytest.param(sequence, id=sequence[0]))
    return parameters


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, tiny_model_factory, tokenizer) -> Path:
    """The quickstart's folder, the repository's files, and a recipe with a checkpoint."""
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
        training.main(*METHODS["sft_go"].classes, ["--config", "RECIPE.yaml", "--max_steps", "1"])
    return folder


@pytest.fixture
def folder(quickstart, tmp_path, monkeypatch) -> Path:
    folder = shutil.copytree(quickstart, tmp_path / "folder", symlinks=True)
    monkeypatch.chdir(folder)
    module = sys.modules[cached_scores.__module__]
    monkeypatch.setattr(module, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", python_in_this_process)
    return folder


def python_in_this_process(command, run=subprocess.run, **options):
    """Replaces `subprocess.run`, so that scripts which start Python import nothing again."""
    if command[0] != sys.executable:
        return run(command, **options)
    output = StringIO()
    with redirect_stdout(output):
        start(Namespace(module=False, training_script=command[1], training_script_args=command[2:]))
    return SimpleNamespace(stdout=output.getvalue())


def made_small(command: str) -> str:
    return " ".join([command, *(flags for start, flags in SMALL.items() if command.startswith(start))])


def run(command: str) -> None:
    program, *words = split(made_small(command))
    if program == "hf-sft-variants" and words[0] == "compare":
        assert plan_runs(read_study(words[words.index("--config") + 1]))
    elif program == "hf-sft-variants":
        assert main(words) == 0
    elif program == "trl":
        start(launch_of_trl(words))
    elif program == "accelerate":
        start(launch_command_parser().parse_args(words[1:]))
    else:
        is_module = words[0] == "-m"
        script, *arguments = words[is_module:]
        start(Namespace(module=is_module, training_script=script, training_script_args=arguments))


@pytest.mark.parametrize("sequence", sequences_to_run())
def test_commands(sequence, folder):
    for command in sequence:
        run(command)
    for config in re.findall(r"(?:trl sft|-m [\w.]+) --config (\S+)", "\n".join(sequence)):
        assert_trained(folder / yaml.safe_load((folder / config).read_text())["output_dir"])


def assert_trained(output: Path) -> None:
    """There is an adapter, trained by the method its folder is named after."""
    assert (output / "adapter_model.safetensors").is_file()
    tags = {*ModelCard.load(output / "README.md").data.tags} & {*TAGS.values()}
    assert tags == {tag for method, tag in TAGS.items() if output.name.startswith(method)}


@pytest.mark.parametrize("command", named_programs())
def test_named_program(command, folder):
    with pytest.raises(SystemExit, match="0") if "--help" in command else nullcontext():
        run(command)


@pytest.mark.parametrize("command", named("hf-sft-variants"))
def test_named_command(command, folder, capsys):
    """Runs commands with a recipe; of others, which need a model or the Hub, checks the flags."""
    _, subcommand, *words = made_small(command).split()
    if "--config" in words:
        run(command)
    else:
        with pytest.raises(SystemExit, match="0"):
            main([subcommand, "--help"])
        flags = {word for word in words if word.startswith("--")}
        assert flags <= {*re.findall(r"--[\w-]+", capsys.readouterr().out)}


def test_each_recipe_of_the_quickstart_is_started_by_trl():
    assert {*all_commands()} >= {f"trl sft --config {path}" for path in RECIPES}


def test_what_changes_the_environment_is_run_by_ci():
    (repository,) = re.findall(r"^repository-code: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    for command in {*all_commands(), *named("make")} - {f"pip install git+{repository}"}:  # CI has a checkout
        assert not command.startswith(FOR_CI_ONLY) or is_run_by_ci(command), command
