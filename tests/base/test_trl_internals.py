"""What we rely on in TRL beyond its documented names: a failure here says what is gone, and who needs it."""

import ast
import importlib
import inspect
from functools import cache
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name

import pytest
from helpers import make_trainer
from methods import needs
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

import hf_sft_variants


PACKAGE = Path(hf_sft_variants.__file__).parent
LIBRARIES = ("accelerate", "datasets", "peft", "transformers", "trl")
TRAINERS = [name for name in hf_sft_variants.__all__ if name.endswith("Trainer")]


@pytest.fixture
def trl_internals():
    """Imported late: where a name is gone, only the test that says so should be in the way."""
    return importlib.import_module("hf_sft_variants.base.trl_internals")


@cache
def imported_names() -> set[tuple[str, str, str]]:
    """File, module and name of each import from a library. Read off the files: importing them would fail first."""
    return {
        (str(path.relative_to(PACKAGE)), node.module, alias.name)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.partition(".")[0] in LIBRARIES
        for alias in node.names
    }


def missing_import(file: str, module: str, name: str) -> str | None:
    library = module.partition(".")[0]
    try:
        if hasattr(importlib.import_module(module), name):
            return None
    except ModuleNotFoundError:
        pass
    return f"{library} {version(library)} has no `{module}.{name}`, which {file} imports"


def changed_method(name: str, parameters: list[str]) -> str | None:
    """The parameters are compared by name: those that are new, or gone, are in the message."""
    versions = f"trl {version('trl')} with transformers {version('transformers')}"
    method = getattr(SFTTrainer, name, None)
    if method is None:
        return f"`SFTTrainer.{name}` is gone in {versions}: see who overrides or calls it"
    found = list(inspect.signature(method).parameters)[1:]
    if found != parameters:
        return f"`SFTTrainer.{name}` takes {found} in {versions}, not {parameters}: see who overrides or calls it"
    return None


def test_imported_names_are_there():
    names = imported_names()
    assert len(names) > 50
    assert not [message for name in sorted(names) if (message := missing_import(*name))]


def test_names_that_trl_does_not_export_are_imported_in_one_module():
    assert {file for file, module, _ in imported_names() if module.startswith("trl.")} == {"base/trl_internals.py"}


def test_a_name_that_is_gone_is_in_the_message(monkeypatch):
    monkeypatch.delattr("trl.trainer.utils.get_config_model_id")
    messages = [message for name in sorted(imported_names()) if (message := missing_import(*name))]
    assert messages == [
        f"trl {version('trl')} has no `trl.trainer.utils.get_config_model_id`, which base/trl_internals.py imports"
    ]
    gone = missing_import("base/trl_internals.py", "trl.trainer.moved", "get_config_model_id")
    assert gone.startswith(f"trl {version('trl')} has no `trl.trainer.moved.get_config_model_id`")


def test_methods_take_what_we_give_them(trl_internals):
    changes = (changed_method(name, parameters) for name, parameters in trl_internals.METHODS.items())
    assert not [message for message in changes if message]


def test_a_method_that_is_gone_or_changed_is_in_the_message(trl_internals, monkeypatch):
    for name, parameters in trl_internals.METHODS.items():
        with monkeypatch.context() as patch:
            patch.setattr(SFTTrainer, name, lambda self, other: None)
            assert f"`SFTTrainer.{name}` takes ['other']" in changed_method(name, parameters)
        with monkeypatch.context() as patch:
            for owner in SFTTrainer.__mro__:
                if name in vars(owner):
                    patch.delattr(owner, name)
            assert f"`SFTTrainer.{name}` is gone" in changed_method(name, parameters)


@pytest.mark.parametrize(
    "trainer",
    [
        *(f"hf_sft_variants:{name}" for name in TRAINERS),
        pytest.param("hf_sft_variants.sftmix.reference_phase:ReferenceTrainer", marks=needs("sftmix")),
    ],
)
def test_what_we_override_is_listed(trainer, trl_internals):
    """An override of a method that is gone would never be called."""
    trainer_class = resolve_name(trainer)
    ours = [cls for cls in trainer_class.__mro__ if cls.__module__.startswith("hf_sft_variants.")]
    overridden = {
        name: value
        for cls in ours
        for name, value in vars(cls).items()
        if name in dir(SFTTrainer) and not name.startswith("__")
    }
    undocumented = {name for name in overridden if name.startswith("_")}
    assert undocumented <= {*trl_internals.METHODS, *trl_internals.ATTRIBUTES}
    for name in overridden.keys() - undocumented:
        parameters, expected = (
            inspect.signature(method).parameters for method in (overridden[name], getattr(SFTTrainer, name))
        )
        assert parameters.keys() in (expected.keys(), {"self", "args", "kwargs"}), name


def test_attributes_are_there(tiny_model, tokenizer, token_rows, tmp_path, trl_internals):
    trainer = make_trainer(SFTTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path, max_steps=1)
    trainer.train()
    assert not [name for name in trl_internals.ATTRIBUTES if not hasattr(trainer, name)], "an `SFTTrainer` lacks these"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_trainers_take_the_arguments_of_sft_trainer(trainer):
    trainer_class = getattr(hf_sft_variants, trainer)
    parameters, expected = (
        {name: parameter.default for name, parameter in inspect.signature(cls.__init__).parameters.items()}
        for cls in (trainer_class, SFTTrainer)
    )
    assert parameters == expected


def test_counts_are_made_with_the_batches():
    """`get_batch_samples` counts tokens itself, and returns None where the model takes no count."""
    assert "_get_num_items_in_batch(batch_samples, device)" in inspect.getsource(Trainer.get_batch_samples)
    assert ".gather(" in inspect.getsource(Trainer._get_num_items_in_batch)


def test_a_push_leaves_out_what_the_api_is_told_to():
    for method in (Trainer.push_to_hub, Trainer._push_from_checkpoint):
        assert "hf_api().upload_folder(" in inspect.getsource(method), "more than was asked for may go to the Hub"
