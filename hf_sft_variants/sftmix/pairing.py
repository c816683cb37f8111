"""
Which examples can be partners, and an order of them in pairs: a function of the seed and the epoch, so that a resumed
run or another number of processes draws the same.
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
    Halves that have nothing to do with confidence.

    Returns:
        `torch.Tensor` of shape `(num_examples,)`: `CONFIDENT` and `UNCONFIDENT` equally often; `NEITHER` for one
        example of an odd number.
    """
    return halves_of_order(np.random.default_rng(seed % 2**64).permutation(num_examples), num_examples)


def halves_of_order(order: np.ndarray, num_examples: int) -> torch.Tensor:
    """
    Cut an order of examples into two equal halves.

    Args:
        order (`np.ndarray`):
            Numbers of the examples that take part, the confident ones first.
        num_examples (`int`):
            Number of all examples.

    Returns:
        `torch.Tensor` of shape `(num_examples,)`: The half of each example; `NEITHER` for the middle one of an odd
        number and for those that take no part.
    """
    halves = torch.full((num_examples,), NEITHER, dtype=torch.int8)
    size = len(order) // 2
    halves[order[:size]] = CONFIDENT
    halves[order[len(order) - size :]] = UNCONFIDENT
    return halves


class PairSampler(Sampler[int]):
    """
    Yields rows so that each two are a pair: a confident one, then an unconfident one.

    Partners are drawn anew each epoch without replacement. Rows without a partner come last, in random order too. Any
    even number of rows in sequence, from the start, is whole pairs.

    Args:
        halves (`torch.Tensor` of shape `(num_rows,)`):
            Half of each row. May be replaced between epochs.
        seed (`int`):
            Seed of the draw.
        num_labels (`np.ndarray` of shape `(num_rows,)`, *optional*):
            Given, partners and the pairs of a batch have similar numbers: rows are sorted within random groups, as
            `group_by_length` does it, and the batches shuffled.
        batch_size (`int`, *optional*, defaults to `2`):
            Rows of a batch. Used with `num_labels` only.
    """

    def __init__(self, halves: torch.Tensor, seed: int, num_labels: np.ndarray | None = None, batch_size: int = 2):
        self.halves = halves
        self.seed = seed
        self.num_labels = num_labels
        self.pairs_per_batch = max(batch_size // 2, 1)
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
        others = np.concatenate([confident[size:], unconfident[size:], others])
        pairs = np.stack([confident[:size], unconfident[:size]], axis=1)
        if self.num_labels is not None:
            pairs = self._group_by_length(pairs, generator)
        yield from np.concatenate([pairs.flatten(), others]).tolist()

    def _group_by_length(self, pairs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        # As transformers' `LengthGroupedSampler`: groups of 50 batches, or fewer so that there are at least four
        num_batches = max(min(len(pairs) // (4 * self.pairs_per_batch), 50), 1)
        pairs = pairs.copy()
        for start in range(0, len(pairs), num_batches * self.pairs_per_batch):
            group = pairs[start : start + num_batches * self.pairs_per_batch]
            order = np.argsort(-self.num_labels[group], axis=0, kind="stable")
            group[:] = np.take_along_axis(group, order, axis=0)
        num_in_batches = len(pairs) // self.pairs_per_batch * self.pairs_per_batch
        batches = pairs[:num_in_batches].reshape(-1, self.pairs_per_batch, 2)
        return np.concatenate([generator.permutation(batches).reshape(-1, 2), pairs[num_in_batches:]])


class BeginEpochCallback(TrainerCallback):
    """
    Calls `begin_epoch` of a trainer. A data loader tells its sampler the epoch, too, but not in the first epoch after
    a resume with several processes.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.begin_epoch(int(state.epoch))


def number_example(example: dict[str, Any], row: int, is_train: bool) -> dict[str, Any]:
    """Give an example its row as number, on each token; those of evaluation sets have none."""
    number = row if is_train else NEITHER
    return {
        "example_number": [number] * len(example["input_ids"]),
        "example_row": row,
        "num_labels": sum(label != -100 for label in example["labels"][1:]),
    }


def check_number(num_labels: Iterable[int]) -> None:
    """
    Say so if the training examples, by their numbers of labels, don't make pairs.

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
