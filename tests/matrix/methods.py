"""The trainers of the matrix: each as it is used, and as the control that is `SFTTrainer`."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_sft_variants import (
    AnnotatedSFTTrainer,
    PoFTConfig,
    PoFTTrainer,
    SFTGOConfig,
    SFTGOTrainer,
    SFTKeyConfig,
    SFTKeyTrainer,
    SFTMixConfig,
    SFTMixTrainer,
)


SFT = (SFTTrainer, SFTConfig)


@dataclass
class Method:
    """A trainer, what its configuration is given, and what makes it `SFTTrainer` again."""

    trainer_class: type[SFTTrainer]
    config_class: type[SFTConfig]
    options: dict[str, Any] = field(default_factory=dict)
    control: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[type[SFTTrainer], type[SFTConfig]]:
        return self.trainer_class, self.config_class


METHODS = {
    "base": Method(AnnotatedSFTTrainer, SFTConfig),
    "sft_go": Method(SFTGOTrainer, SFTGOConfig, {"min_grouped_tokens": 2}, {"worst_group_weight": 0.0}),
    "sftkey": Method(
        SFTKeyTrainer, SFTKeyConfig, {"stages": ["key"], "key_pattern": r"(?P<key>\w+)\s*$"}, {"stages": ["full"]}
    ),
    # Equal to SFTTrainer on rows with as many labels each
    "poft": Method(PoFTTrainer, PoFTConfig, {"beta": 2.0}, {"preference_weighting": "uniform"}),
    "sftmix": Method(
        SFTMixTrainer,
        SFTMixConfig,
        {"confidence_split": "random"},
        {"confidence_split": "random", "mixup_weight": 0.0, "pair_sampling": False},
    ),
}


def with_references(rows: Dataset) -> Dataset:
    """The rows with what two reference models think of them, which PoFT needs."""
    return rows.add_column("ref_logps", [[-5.0 - row / 4, -7.0 + row % 3] for row in range(len(rows))])


def rows_with_equal_labels() -> Dataset:
    """Sixteen rows of tokens of different lengths with nine labels each: on them PoFT's control is `SFTTrainer`."""
    generator = torch.Generator().manual_seed(3)
    rows = {"input_ids": [], "labels": []}
    for length in (30, 12, 17, 11, 25, 18, 21, 14, 29, 15, 13, 19, 24, 23, 16, 27):
        input_ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        rows["input_ids"].append(input_ids)
        rows["labels"].append([-100] * (length - 9) + input_ids[-9:])
    return Dataset.from_dict(rows)


every_method = pytest.mark.parametrize("method", METHODS)


def cells(area: str, values: dict[str, Any]) -> list:
    """For `parametrize`: each value is a cell of an area by its name."""
    return [pytest.param(value, id=name, marks=pytest.mark.cell(area, name)) for name, value in values.items()]
