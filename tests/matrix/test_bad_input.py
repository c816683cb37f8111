"""Bad input is an error in words that comes before the first optimizer step: see `bad_inputs` and `bad_files`."""

import copy
import re
from dataclasses import fields
from types import SimpleNamespace

import bad_files
import bad_inputs
import pytest
from datasets import Dataset, IterableDataset
from helpers import SMALL
from methods import METHODS, with_references
from trl import SFTConfig, SFTTrainer

from hf_sft_variants.errors import InputError
from hf_sft_variants.launch.recipe import make_parser, parse


TABLE = [
    *bad_inputs.RANGES, *bad_inputs.CHOICES, *bad_inputs.CONFLICTS, *bad_inputs.ROWS, *bad_inputs.COLUMNS,
    *bad_inputs.ARGUMENTS, *bad_files.FILES, *bad_files.MODELS,
]  # fmt: skip
OWN_FIELDS = [
    (name, field.name)
    for name, method in METHODS.items()
    for field in fields(method.config_class)
    if field.name not in SFTConfig.__dataclass_fields__
]
# Refusals of TRL and transformers, which keep their class
THEIRS = (
    "Invalid packing strategy", "The specified `eos_token`", "`max_length` is not enforced",
    "You set `assistant_only_loss=True`", "`train_dataset` is required", "Can't instantiate a processor",
    "tokenizer.chat_template is not set",
)  # fmt: skip
REFERENCES = {"reference_models", "reference_score_file"}


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    """Whatever trains fails the test."""

    def training_step(self, *args, **kwargs):
        raise AssertionError("It trains.")

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)


@pytest.fixture
def world(tiny_model, tokenizer, token_rows, chat_rows, tmp_path):
    """What a case is made from; it may change its own copies."""
    rows = {"tokens": token_rows, "chat": chat_rows, "raw chat": chat_rows}
    rows |= {"raw texts": Dataset.from_dict({"text": ["a b", "c"]}), "stream": token_rows.to_iterable_dataset()}
    rows["stream of large ids"] = IterableDataset.from_generator(lambda: iter([{"input_ids": [5, 2**70]}]))
    return SimpleNamespace(model=tiny_model, tokenizer=copy.deepcopy(tokenizer), rows=rows, folder=tmp_path)


def rows_of(case, world):
    rows = world.rows[case.rows] if isinstance(case.rows, str) else case.rows
    if isinstance(rows, list | dict):
        rows = Dataset.from_list(rows) if isinstance(rows, list) else Dataset.from_dict(rows)
    needs_references = case.method == "poft" and not REFERENCES & case.options.keys()
    if not needs_references or str(case.rows).startswith("raw") or "ref_logps" in rows.column_names:
        return rows
    return with_references(rows)


def filled(value, case, world):
    """A value of the configuration with paths in the place of `FILE` and `FOLDER`."""
    if isinstance(value, list):
        return [filled(item, case, world) for item in value]
    if not isinstance(value, str) or not value.startswith(("FILE", "FOLDER")):
        return value
    path = world.folder / value
    if case.file is not None and not path.exists():
        case.file(path, world)
    return str(path)


@pytest.mark.cell(
    "Bad input", "wrong data, options, files and models: an error in words, nothing trains", refused=True
)
@pytest.mark.parametrize(
    "method, case",
    [
        pytest.param(case.method, case, id=f"{case.method}-{re.sub(r'[^a-z0-9_ ]', '', case.message)}")
        for case in TABLE
    ],
)
@pytest.mark.filterwarnings("ignore:.*keep_end:FutureWarning")
def test_table(method, case, world):
    (world.folder / "FOLDER").mkdir()
    error = ValueError if case.message.startswith(THEIRS) else case.error
    with pytest.raises(error, match=case.message) as caught:
        options = {name: filled(value, case, world) for name, value in case.options.items()}
        model = world.model if case.model is None else case.model(world, world.folder / "FOLDER")
        used = METHODS[method]
        arguments = {
            "args": used.config_class(str(world.folder / "run"), **SMALL, **options),
            "train_dataset": rows_of(case, world),
            "processing_class": world.tokenizer,
            **case.arguments,
        }
        used.trainer_class(model, **arguments).train()
    assert type(caught.value) is error


@pytest.mark.cell("Bad input", "a value of another type in each field of the configuration", refused=True)
@pytest.mark.parametrize("method, name", OWN_FIELDS)
def test_types(method, name, tmp_path):
    with pytest.raises(InputError, match=rf"`{name}` must be .*, got 3j\."):
        METHODS[method].config_class(str(tmp_path), **SMALL, **{name: 3j})


@pytest.mark.cell("Bad input", "wrong keys, types and values in recipes", refused=True)
@pytest.mark.parametrize("method, recipe, message", bad_files.RECIPES)
def test_recipes(method, recipe, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(InputError, match=message):
        parse(make_parser(*METHODS[method].classes), ["--config", str(tmp_path / "recipe.yaml")])


def test_there_are_enough():
    assert len(TABLE) >= 60 and {case.method for case in TABLE} == set(METHODS)
