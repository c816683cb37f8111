"""
Assigns examples to halves and draws the order of pairs. Both depend only on the seed and the epoch, so resuming or
changing the number of processes does not affect them.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import Trainer


CONFIDENT, UNCONFIDENT, NEITHER = 1, 0, -1


def random_halves(num_examples: int, seed: int) -> torch.Tensor:
    """Assign examples to random halves, as a control. With an odd number, one example is `NEITHER`."""
    return halves_of_order(np.random.default_rng(seed % 2**64).permutation(num_examples), num_examples)


def halves_of_order(order: np.ndarray, num_examples: int) -> torch.Tensor:
    """
    Split examples into two equal halves. `order` has the numbers of the examples, the most confident one first. The
    middle one of an odd number and examples that are not in `order` are `NEITHER`.
    """
    halves = torch.full((num_examples,), NEITHER, dtype=torch.int8)
    size = len(order) // 2
    halves[order[:size]] = CONFIDENT
    halves[order[len(order) - size :]] = UNCONFIDENT
    return halves


def order_by_confidence(mean_perplexity: np.ndarray, mean_nll: np.ndarray, measure: str) -> np.ndarray:
    """
    Return the numbers of the examples, the most confident one first. Ties are broken by mean NLL, then by number.
    Examples without a value (NaN) are left out.
    """
    by = (mean_nll, mean_perplexity) if measure == "perplexity" else (mean_nll,)
    order = np.lexsort(by)  # stable; the last key counts first
    return order[~np.isnan(mean_nll[order])]


def split_in_halves(mean_perplexity: np.ndarray, mean_nll: np.ndarray, measure: str) -> torch.Tensor:
    """Split examples into halves by their confidence."""
    return halves_of_order(order_by_confidence(mean_perplexity, mean_nll, measure), len(mean_nll))


def draw_order(halves: torch.Tensor, seed: int, epoch: int) -> list[int]:
    """
    Draw the order of the rows in an epoch, given their halves: first pairs of a confident and an unconfident row,
    drawn without replacement and different in each epoch, then the rows without a partner in random order.
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
    Yields the rows of an [`SFTMixTrainer`] in pairs, using the trainer's halves at the start of the epoch. In
    `train()` the epoch is read from the trainer, because data loaders don't set it in the first epoch after resuming
    with several processes.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """For data loaders outside of `train()`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.trainer.train_dataset)

    def __iter__(self) -> Iterator[int]:
        args = self.trainer.args
        halves = self.trainer.halves[torch.tensor(self.trainer.train_dataset["example_row"][:])]
        seed = args.seed if args.data_seed is None else args.data_seed
        epoch = int(self.trainer.state.epoch or 0) if self.trainer.is_in_train else self.epoch
        yield from draw_order(halves, seed, epoch)
