"""
Assigns examples to halves and draws an order of pairs. Both are functions of the seed and the epoch, so a resumed run
or another number of processes draws the same.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import Trainer


CONFIDENT, UNCONFIDENT, NEITHER = 1, 0, -1


def random_halves(num_examples: int, seed: int) -> torch.Tensor:
    """Random halves, the control; `NEITHER` for one example of an odd number."""
    return halves_of_order(np.random.default_rng(seed % 2**64).permutation(num_examples), num_examples)


def halves_of_order(order: np.ndarray, num_examples: int) -> torch.Tensor:
    """
    Split examples into two equal halves by their order, the numbers of those to split with the most confident one
    first. `NEITHER` are the middle one of an odd number and examples that are not in `order`.
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


def draw_order(halves: torch.Tensor, seed: int, epoch: int) -> list[int]:
    """
    Order of the rows with these halves in an epoch: pairs of a confident row and an unconfident one, drawn anew each
    epoch without replacement, and then in random order the rows without a partner.
    """
    generator = np.random.default_rng([seed % 2**64, epoch])
    confident, unconfident, others = (
        generator.permutation((halves == half).nonzero().flatten().numpy())
        for half in (CONFIDENT, UNCONFIDENT, NEITHER)
    )
    size = min(len(confident), len(unconfident))
    pairs = np.stack([confident[:size], unconfident[:size]], axis=1).flatten()
    return np.concatenate([pairs, confident[size:], unconfident[size:], others]).tolist()


class PairSampler(Sampler[int]):
    """
    Yields the rows of an [`SFTMixTrainer`] in pairs, by the halves that it has when an epoch begins. The epoch is the
    trainer's: a data loader sets none in the first epoch after resuming with several processes.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def __len__(self) -> int:
        return len(self.trainer.train_dataset)

    def __iter__(self) -> Iterator[int]:
        args = self.trainer.args
        halves = self.trainer.halves[torch.tensor(self.trainer.train_dataset["example_row"][:])]
        seed = args.seed if args.data_seed is None else args.data_seed
        yield from draw_order(halves, seed, int(self.trainer.state.epoch or 0))
