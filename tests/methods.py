"""The one table of methods: a method whose folder is missing falls out, and its cases in shared tests with it."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import hf_sft_variants


SFT = (SFTTrainer, SFTConfig)


@dataclass
class Method:
    """A trainer, the options it is tested with, and the control settings that make it `SFTTrainer` again."""

    trainer_class: type[SFTTrainer]
    config_class: type[SFTConfig]
    options: dict[str, Any] = field(default_factory=dict)
    control: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[type[SFTTrainer], type[SFTConfig]]:
        return self.trainer_class, self.config_class


_KEY = {"key_pattern": r"(?P<key>\w+)\s*$"}
_RANDOM = {"confidence_split": "random"}
_VARIANTS = {
    "sft_go": ("SFTGO", {"min_grouped_tokens": 2}, {"worst_group_weight": 0.0}),
    "sftkey": ("SFTKey", {"stages": ["key"], **_KEY}, {"stages": ["full"]}),
    # Equal to SFTTrainer on rows with the same number of labels each
    "poft": ("PoFT", {"beta": 2.0}, {"preference_weighting": "uniform"}),
    "sftmix": ("SFTMix", _RANDOM, {**_RANDOM, "mixup_weight": 0.0, "pair_sampling": False}),
    # The answer is whatever a row's last word ends with
    "weighted": ("WeightedSFT", {"answer_weight": 30.0, "key_pattern": r"(?s)\A.*(?P<key>\S)\s*\Z"}, {}),
}
METHODS = {"base": Method(hf_sft_variants.AnnotatedSFTTrainer, SFTConfig)} | {
    name: Method(
        getattr(hf_sft_variants, f"{prefix}Trainer"), getattr(hf_sft_variants, f"{prefix}Config"), options, control
    )
    for name, (prefix, options, control) in _VARIANTS.items()
    if find_spec(f"hf_sft_variants.{name}")
}

every_method = pytest.mark.parametrize("method", METHODS)


def only(*names: str) -> pytest.MarkDecorator:
    """Parametrizes `method` with those of the methods that are there."""
    return pytest.mark.parametrize("method", [name for name in names if name in METHODS])


def needs(*names: str) -> pytest.MarkDecorator:
    """Skips a test of particular methods where one of them is missing."""
    return pytest.mark.skipif(not METHODS.keys() >= set(names), reason=f"needs {names}")


def cases_of(cases: dict[Any, str]) -> list:
    """For `parametrize`: the keys of cases whose method is there."""
    return [case for case, method in cases.items() if method in METHODS]


# Relative, of a control to SFTTrainer, whose LM head rounds in another order
TOLERANCE = 1e-6


def with_references(rows: Dataset) -> Dataset:
    """The rows with the log-probabilities of two reference models, which PoFT needs."""
    return rows.add_column("ref_logps", [[-5.0 - row / 4, -7.0 + row % 3] for row in range(len(rows))])


def cells(area: str, values: dict[str, Any]) -> list:
    """For `parametrize`: each value is a cell of the compatibility table, in an area and by its name."""
    return [pytest.param(value, id=name, marks=pytest.mark.cell(area, name)) for name, value in values.items()]
