"""Code blocks in README, docs and public docstrings run, with a small model and small data in place of the Hub's."""

import json
import re
import textwrap
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path

import datasets
import pytest
import yaml
from datasets import Dataset
from methods import METHODS
from trl import SFTConfig

import hf_sft_variants
from hf_sft_variants.comparison.study import STUDY_KEYS, parse_study
from hf_sft_variants.launch.training import make_parser, parse


ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *(page for folder in ("docs", "recipes") for page in sorted((ROOT / folder).rglob("*.md"))),
]
HUB_MODELS = re.compile(r'"((?:Qwen|HuggingFaceH4|meta-llama|01-ai)/[\w.-]+)"')


def texts() -> dict[str, str]:
    """The pages and the docstrings of public names."""
    pages = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES if "_build" not in page.parts}
    names = [name for name in hf_sft_variants.__all__ if name != "__version__"]
    return pages | {name: getattr(hf_sft_variants, name).__doc__ or "" for name in names}


def blocks(language: str) -> list:
    return [
        pytest.param(textwrap.dedent(code), id=f"{where}-{number}")
        for where, text in texts().items()
        for number, (_, code) in enumerate(re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.M))
    ]


def small_data_set(chat_rows: Dataset, name: str, *args, **kwargs) -> Dataset:
    """Rows with the columns of the data set of that name."""
    rows = [[row["prompt"][0]["content"], row["completion"][0]["content"]] for row in chat_rows]
    if name == "openai/gsm8k":
        return Dataset.from_list([{"question": question, "answer": answer} for question, answer in rows])
    messages = [[{"role": "user", "content": first}, {"role": "assistant", "content": last}] for first, last in rows]
    return Dataset.from_list([{"messages": conversation} for conversation in messages])


def on_cpu(args: SFTConfig, post_init: Callable) -> None:
    """Turn off bfloat16, TRL's default, which needs a GPU."""
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
    """Keys of a recipe that its `module` accepts, or without one every method; or keys of a study."""
    mapping = yaml.safe_load(code)
    assert mapping
    if set(mapping) <= set(STUDY_KEYS):
        parse_study({**yaml.safe_load((ROOT / "studies" / "quickstart.yaml").read_text()), **mapping}, "study.yaml")
        return
    recipe = {"model_name_or_path": "a/model", "dataset_name": "a/data", "output_dir": "out", **mapping}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    module = mapping.get("module", "").removeprefix("hf_sft_variants.")
    for name in {module} & METHODS.keys() or METHODS.keys() - {"base"}:
        flags = ["--config", str(tmp_path / "recipe.yaml"), "--use_cpu", "true", "--bf16", "false"]
        parse(make_parser(*METHODS[name].classes), flags)


@pytest.mark.parametrize("code", blocks("diff"))
def test_diff(code):
    """Both the old and the new version work: they are imports, or a row of data."""
    for sign in "-+":
        version = "\n".join(line[1:].strip() for line in code.splitlines() if line.startswith((sign, " ")))
        if version.startswith("{"):
            assert json.loads(version)["messages"]
        else:
            exec(version)


def test_no_block_is_left_out():
    """`test_commands.py` runs the bash blocks."""
    for where, text in texts().items():
        for language in re.findall(r"^ *```(.*?)\n.*?^ *```", text, re.DOTALL | re.MULTILINE):
            assert language in ("bash", "diff", "python", "yaml") or language.startswith("{"), where
