"""The site builds without warnings and names everything public: classes, config fields, metrics."""

import ast
import html
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from datasets import Dataset
from helpers import make_trainer
from trl import SFTConfig

import hf_sft_variants


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
METHODS = {"sft_go": "SFTGO", "sftkey": "SFTKey", "poft": "PoFT", "sftmix": "SFTMix"}

# Metrics depend on the grouping
RUNS = [
    ("sft_go", {"min_grouped_tokens": 2}),
    ("sft_go", {"group_by": "column", "group_column": "groups", "min_grouped_tokens": 2}),
    ("sftkey", {"key_pattern": r"#### (?P<key>.+)", "answer_eval_steps": 5, "answer_eval_max_new_tokens": 2}),
    ("poft", {}),
    ("sftmix", {"confidence_split": "random"}),
]


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """Broken links are warnings, and warnings are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-d", folder / "doctrees", DOCS, folder / "html"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder / "html"


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", page.read_text()))


def test_public_names(site):
    ids = set(re.findall(r'id="hf_sft_variants\.(\w+)"', "".join(page.read_text() for page in site.rglob("*.html"))))
    assert ids >= set(hf_sft_variants.__all__) - {"__version__"}


@pytest.mark.parametrize("method", METHODS)
def test_fields(method, site):
    config_class = getattr(hf_sft_variants, f"{METHODS[method]}Config")
    own = {field.name for field in fields(config_class)} - set(SFTConfig.__dataclass_fields__)
    described = set(re.findall(r"<strong>(\w+)</strong>", (site / "methods" / f"{method}.html").read_text()))
    assert own <= described, own - described


@pytest.mark.parametrize("method", METHODS)
def test_defaults(method):
    """The docstring, from which the page is generated, has the defaults of the config's own fields."""
    config_class = getattr(hf_sft_variants, f"{METHODS[method]}Config")
    for name, value in vars(config_class("out", use_cpu=True, bf16=False)).items():
        if name in config_class.__dataclass_fields__ and name not in SFTConfig.__dataclass_fields__:
            found = re.search(
                rf"^ +{name} \(`.+?`, \*optional\*(?:, defaults to `(.+?)`)?\):", config_class.__doc__, re.M
            )
            assert found and ast.literal_eval(found[1] or "None") == value, name


@pytest.mark.parametrize("method, options", RUNS)
def test_metrics(method, options, tiny_model, tokenizer, chat_rows, tmp_path):
    if method == "poft":
        chat_rows = chat_rows.add_column("ref_logps", [[-2.0, -3.0]] * len(chat_rows))
    if "answer_eval_steps" in options:
        chat_rows = chat_rows.add_column("answer", ["7"] * len(chat_rows))
    if "group_column" in options:
        chat_rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "groups": [0, 0, 1, 1]}] * 4)
    classes = [getattr(hf_sft_variants, f"{METHODS[method]}{part}") for part in ("Trainer", "Config")]
    options = {**options, "eval_dataset": chat_rows, "num_train_epochs": 2, "save_strategy": "no"}
    trainer = make_trainer(*classes, tiny_model, tokenizer, chat_rows, tmp_path, **options)
    trainer.train()
    trainer.evaluate()
    logged = {name.removeprefix("eval_") for log in trainer.state.log_history for name in log}
    own = {name for name in logged if name.startswith(f"{method}/")}
    page = (DOCS / "methods" / f"{method}.md").read_text()
    documented = [re.sub(r"<\w+>", r"\\w+", name) for name in re.findall(rf"`(?:eval_)?({method}/[\w<>]+)`", page)]
    assert own
    for name in own:
        assert any(re.fullmatch(pattern, name) for pattern in documented), name


def test_every_page_is_reached(site):
    """Sphinx warns of a page in no table of contents; this also catches an excluded page."""
    start = (site / "index.html").read_text()
    for page in [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]:
        if "_build" not in page.parts and page.name != "index.md":
            assert f'href="{page.relative_to(DOCS).with_suffix(".html")}"' in start, page


def test_nothing_is_loaded_from_elsewhere(site):
    """The site works offline, including its search."""
    assert (site / "searchindex.js").is_file()
    for page in site.rglob("*.html"):
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://[^"]*"', page.read_text()), page
