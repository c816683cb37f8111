"""
Assigns examples to halves and draws an order of pairs. Both are functions of the seed and the epoch, so a resumed run
or another number of processes draws the same.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


CONFIDENT, UNCONFIDENT, NEITHER = 1, 0, -1


def random_halves(num_examples: int, seed: int) -> torch.Tensor:
    """Random halves, the control; `NEITHER` for one example of an odd number."""
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
        `torch.Tensor` of shape `(num_examples,)`: `CONFIDENT` or `UNCONFIDENT`; `NEITHER` for the middle one of an odd
        number and for examples that are not in `order`.
    """
    halves = torch.full((num_examples,), NEITHER, dtype=torch.int8)
    size = len(order) // 2
    halves[order[:size]] = CONFIDENT
    halves[order[len(order) - size :]] = UNCONFIDENT
    return halves


def order_by_confidence(mean_perplexity: np.ndarray, mean_nll: np.ndarray, measure: str) -> np.ndarray:
    """
    Numbers of the examples, the most confident one first. Ties go by mean NLL, then by number. Examples without a
    value (NaN) are left out.
    """
    by = (mean_nll, mean_perplexity) if measure == "perplexity" else (mean_nll,)
    order = np.lexsort(by)  # stable; the last key counts first
    return order[~np.isnan(mean_nll[order])]


def split_in_halves(mean_perplexity: np.ndarray, mean_nll: np.ndarray, measure: str) -> torch.Tensor:
    """Halves of examples by their confidence."""
    return halves_of_order(order_by_confidence(mean_perplexity, mean_nll, measure), len(mean_nll))


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
