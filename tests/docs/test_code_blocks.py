"""Blocks of code in README, docs and public docstrings run, with a small model and data in place of the Hub's."""

import re
import shlex
import textwrap
from collections.abc import Callable
from configparser import ConfigParser
from functools import partial, partialmethod
from importlib import import_module
from pathlib import Path

import datasets
import pytest
import yaml
from datasets import Dataset
from trl import SFTConfig

import hf_sft_variants
from hf_sft_variants.cli import build_parser
from hf_sft_variants.comparison.study import STUDY_KEYS, study_of
from hf_sft_variants.recipe import make_parser, parse


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HUB_MODELS = re.compile(r'"((?:Qwen|HuggingFaceH4|meta-llama|01-ai)/[\w.-]+)"')
TRAINERS = {"sft_go": "SFTGO", "sftkey": "SFTKey", "poft": "PoFT", "sftmix": "SFTMix"}


def blocks(language: str) -> list:
    """Blocks of the pages, and of the docstrings of public names."""
    texts = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES if "_build" not in page.parts}
    names = [name for name in hf_sft_variants.__all__ if name != "__version__"]
    texts |= {name: getattr(hf_sft_variants, name).__doc__ or "" for name in names}
    return [
        pytest.param(textwrap.dedent(code), id=f"{where}-{number}")
        for where, text in texts.items()
        for number, (_, code) in enumerate(re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.M))
    ]


def commands() -> list:
    """Lines of the shell, those that end in a backslash joined with the next, without comments."""
    lines = [line for block in blocks("bash") for line in block.values[0].replace("\\\n", " ").split("\n")]
    return sorted({line.strip() for line in lines if shlex.split(line, comments=True)})


def small_data_set(chat_rows: Dataset, name: str, *args, **kwargs) -> Dataset:
    """Rows in the columns of the data set of that name."""
    rows = [[row["prompt"][0]["content"], row["completion"][0]["content"]] for row in chat_rows]
    if name == "openai/gsm8k":
        return Dataset.from_list([{"question": question, "answer": answer} for question, answer in rows])
    messages = [[{"role": "user", "content": first}, {"role": "assistant", "content": last}] for first, last in rows]
    return Dataset.from_list([{"messages": conversation} for conversation in messages])


def on_cpu(args: SFTConfig, post_init: Callable) -> None:
    """Without bfloat16, TRL's default, which needs a GPU."""
    args.use_cpu, args.bf16, args.report_to = True, False, "none"
    post_init(args)


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code, tiny_model, tokenizer, chat_rows, tmp_path, monkeypatch):
    for hub_model in set(HUB_MODELS.findall(code)):
        tiny_model.save_pretrained(tmp_path / hub_model)
        tokenizer.save_pretrained(tmp_path / hub_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", partial(small_data_set, chat_rows))
    monkeypatch.setattr(SFTConfig, "__post_init__", partialmethod(on_cpu, SFTConfig.__post_init__))
    exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("code", blocks("yaml"))
def test_yaml(code, tmp_path):
    """Lines of a recipe, which every method knows, or of a study."""
    mapping = yaml.safe_load(code)
    assert mapping
    if set(mapping) <= set(STUDY_KEYS):
        study_of({**yaml.safe_load((ROOT / "studies" / "quickstart.yaml").read_text()), **mapping}, "study.yaml")
        return
    recipe = {"model_name_or_path": "a/model", "dataset_name": "a/data", "output_dir": "out", **mapping}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for method in TRAINERS:
        read_recipe(method, ["--config", str(tmp_path / "recipe.yaml"), "--use_cpu", "true", "--bf16", "false"])


def read_recipe(method: str, flags: list[str]) -> None:
    classes = [getattr(hf_sft_variants, TRAINERS[method] + part) for part in ("Trainer", "Config")]
    parse(make_parser(*classes), flags)


@pytest.mark.parametrize("command", commands())
def test_command(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command, comments=True)
    CHECKS[program](words)


def check_recipe(words: list[str]) -> None:
    """`trl sft`, `python -m` or `accelerate launch -m` with a recipe: it is there, and its trainer knows the flags."""
    path = words[words.index("--config") + 1]
    if path == "RECIPE.yaml":
        path = "recipes/quickstart/sft_go.yaml"
    recipe = yaml.safe_load(Path(path).read_text())
    if "--accelerate_config" in words:
        assert Path(words.pop(words.index("--accelerate_config") + 1)).is_file()
        words.remove("--accelerate_config")
    if "module" in recipe:  # others are plain SFT
        method = recipe["module"].removeprefix("hf_sft_variants.")
        assert "-m" not in words or words[words.index("-m") + 1] == recipe["module"]
        read_recipe(method, ["--config", path, *words[words.index("--config") + 2 :]])


def check_python(words: list[str]) -> None:
    if words[0] != "-m":
        source = Path(words[0]).read_text()
        assert all(re.search(rf'"{word}"', source) for word in words if word.startswith("--")), words
    elif "--help" in words:
        import_module(words[1])
    else:
        check_recipe(words)


def check_own_command(words: list[str]) -> None:
    build_parser().parse_known_args([word.replace("RECIPE", "recipes/quickstart/sft_go.yaml") for word in words])


def check_make(words: list[str]) -> None:
    assert all(re.search(rf"^{target}:", Path("Makefile").read_text(), re.MULTILINE) for target in words)


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    if "-c" in words:
        assert Path(words[words.index("-c") + 1]).is_file()
    setup = ConfigParser()
    setup.read("setup.cfg")
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(words)):
        assert extra in setup["options.extras_require"]


CHECKS = {
    "accelerate": check_recipe,
    "hf-sft-variants": check_own_command,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "trl": check_recipe,
}
