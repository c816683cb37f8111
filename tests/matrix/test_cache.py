"""The cache of `datasets`: a second start prepares nothing again, and other options do not find a wrong cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forms import FORMS
from methods import METHODS, every_method
from starts import cache_files, prepare
from templates_on_the_spot import TEXT_END


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_factory, tokenizer):
    folder = tmp_path_factory.mktemp("starts")
    tiny_model_factory().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    FORMS["messages"].rows(tokenizer).to_json(folder / "rows.jsonl")
    (folder / "other.jinja").write_text(TEXT_END)
    return folder


@pytest.fixture(scope="module")
def cached(folder):
    """What a first start has cached, and what is there after a second one, in another process with other hashes."""
    for method in METHODS:
        prepare(method, folder)
    first = {method: cache_files(method, folder) for method in METHODS}
    subprocess.run(
        [sys.executable, Path(__file__).with_name("starts.py"), folder],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        stdin=subprocess.DEVNULL,
    )
    return first, {method: cache_files(method, folder) for method in METHODS}


@pytest.mark.cell("Data", "cache: a second start prepares nothing again")
@every_method
def test_second_start(method, cached):
    first, second = cached
    assert len(first[method]) > 4
    assert second[method] == first[method]


OTHER_OPTIONS = {
    "max_length": {"max_length": 72},
    "template": {"chat_template_path": "other.jinja"},
}
METHOD_OPTIONS = {
    "sft_go": {"important_fraction": 0.2},
    "sftkey": {"key_pattern": r"(?P<key>\S+ \w+)\s*$"},
    "poft": {"score_end_of_turn": False},
}


@pytest.mark.cell("Data", "cache: another option prepares anew")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, options) for method in METHODS for options in OTHER_OPTIONS.values()),
        *METHOD_OPTIONS.items(),
    ],
    ids=str,
)
def test_other_options(method, options, cached, folder, tmp_path_factory):
    """Prepared with the cache of the first start as without any."""
    options = {name: str(folder / value) if name == "chat_template_path" else value for name, value in options.items()}
    rows = list(prepare(method, folder, **options).train_dataset)
    empty = tmp_path_factory.mktemp("empty")
    for name in ("model", "rows.jsonl"):
        (empty / name).symlink_to(folder / name)
    assert rows == list(prepare(method, empty, **options).train_dataset)
    assert rows != list(prepare(method, folder).train_dataset)
