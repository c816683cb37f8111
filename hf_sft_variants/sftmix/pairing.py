"""
Assigns examples to halves and draws an order of pairs. Both are functions of the seed and the epoch, so a resumed run
or another number of processes draws the same.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from ..errors import InputError


logger = get_logger(__name__)

CONFIDENT, UNCONFIDENT, NEITHER = 1, 0, -1


def random_halves(num_examples: int, seed: int) -> torch.Tensor:
    """
    Random halves, the control.

    Returns:
        `torch.Tensor` of shape `(num_examples,)`: `CONFIDENT` and `UNCONFIDENT` equally often; `NEITHER` for one
        example of an odd number.
    """
    return halves_of_order(np.random.default_rng(seed % 2**64).permutation(num_examples), num_examples)


def halves_of_order(order: np.ndarray, num_examples: int) -> torch.Tensor:
    """
    Split ordered examples into two equal halves.

    Args:
        order (`np.ndarray`):
            Numbers of the examples to split, the most confident one first.
        num_examples (`int`):
            Total number of examples.

    Returns:
        `torch.Tensor` of shape `(num_examples,)`: Half of each example; `NEITHER` for the middle one of an odd number
        and for examples that are not in `order`.
    """
    halves = torch.full((num_examples,), NEITHER, dtype=torch.int8)
    size = len(order) // 2
    halves[order[:size]] = CONFIDENT
    halves[order[len(order) - size :]] = UNCONFIDENT
    return halves


class PairSampler(Sampler[int]):
    """
    Yields rows in pairs, a confident one followed by an unconfident one.

    Partners are drawn anew each epoch without replacement. Rows without a partner come last, in random order.

    Args:
        halves (`torch.Tensor` of shape `(num_rows,)`):
            Half of each row. May be replaced between epochs.
        seed (`int`):
            Seed of the draw.
    """

    def __init__(self, halves: torch.Tensor, seed: int):
        self.halves = halves
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the pairs of this epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.halves)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed % 2**64, self.epoch])
        confident, unconfident, others = (
            generator.permutation((self.halves == half).nonzero().flatten().numpy())
            for half in (CONFIDENT, UNCONFIDENT, NEITHER)
        )
        size = min(len(confident), len(unconfident))
        pairs = np.stack([confident[:size], unconfident[:size]], axis=1).flatten()
        yield from np.concatenate([pairs, confident[size:], unconfident[size:], others]).tolist()


class BeginEpochCallback(TrainerCallback):
    """
    Calls `begin_epoch` of a trainer. A data loader sets its sampler's epoch, but not in the first epoch after resuming
    with several processes.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.begin_epoch(int(state.epoch))


def number_example(example: dict[str, Any], row: int, is_train: bool) -> dict[str, Any]:
    """Number a training example by its row, on each token; examples for evaluation have no number."""
    number = row if is_train else NEITHER
    return {
        "example_number": [number] * len(example["input_ids"]),
        "example_row": row,
        "num_labels": sum(label != -100 for label in example["labels"][1:]),
    }


def check_number(num_labels: Iterable[int]) -> None:
    """
    Warn of an odd number of training examples with labels.

    Raises:
        `InputError`: If there are fewer than two.
    """
    num_examples = sum(number > 0 for number in num_labels)
    if num_examples < 2:
        raise InputError(
            f"{num_examples} example of the train dataset has labels, but a pair takes two. Add examples."
        )
    if num_examples % 2:
        logger.warning(
            f"{num_examples} examples with labels make no equal halves: one of them has no partner, and is trained on "
            "without mixup."
        )
