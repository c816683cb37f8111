"""Budgets as optimizer steps, which are known before training: the learning-rate schedule is whole."""

import math
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from trl import SFTConfig, SFTTrainer

from ..errors import InputError
from .files import TRAINING_FILE, read_json


def resolve_budget(budget: dict[str, Any], folder: Path) -> tuple[str | None, float | None]:
    """
    Kind of a run's budget, `"steps"` or `"tokens"`, and its amount; that of another arm is read from its run.

    Args:
        budget (`dict[str, Any]`):
            Budget of the run's arm.
        folder (`Path`):
            The run's folder.
    """
    if not budget:
        return None, None
    ((kind, amount),) = budget.items()
    if not kind.endswith("_of"):
        return kind, amount
    kind = kind.removesuffix("_of")
    return kind, read_json(folder.parent.parent / amount / folder.name / TRAINING_FILE)[kind]


def steps_of_tokens(tokens: float, trainer: SFTTrainer) -> int:
    """
    Number of optimizer steps, at least one, whose tokens come nearest to `tokens`. Padding does not count, but the
    steps of a reference that the method trains first do.

    Raises:
        `InputError`: If the data set is a stream, whose tokens can't be counted beforehand.
    """
    if isinstance(trainer.train_dataset, IterableDataset):
        raise InputError("a budget of `tokens` counts the data beforehand, but it is a stream: give `steps`.")
    tokens_per_epoch = sum(map(len, trainer.train_dataset["input_ids"])) * models_trained(trainer.args)
    steps_per_epoch = math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps)
    return max(round(tokens / tokens_per_epoch * steps_per_epoch), 1)


def models_trained(args: SFTConfig) -> int:
    """2 for a method that first trains a reference for as many steps on the same data (SFTMix), else 1."""
    return 2 if getattr(args, "needs_reference", False) else 1
