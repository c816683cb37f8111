"""Confidence from the log-probabilities that training computes anyway, without an extra forward pass."""

from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from accelerate import Accelerator
from transformers import TrainerState

from ..base import AnnotatedBatch
from ..errors import InputError
from .confidence_file import perplexity, split_in_halves
from .pairing import NEITHER


# In the folder of a checkpoint
STATE_FILE = "sftmix_online.pt"


class OnlineConfidence:
    """
    Means of each example's NLL and perplexity over the epochs so far, and the halves of the current epoch.

    Approximates [`ConfidenceTrackingCallback`]: examples early in an epoch are seen by less trained weights than later
    ones, and with dropout.

    Args:
        num_examples (`int`):
            Number of training examples.
        measure (`str`):
            `"perplexity"` or `"mean_nll"`.
    """

    def __init__(self, num_examples: int, measure: str):
        self.measure = measure
        self.epoch = 0
        self.halves = torch.full((num_examples,), NEITHER, dtype=torch.int8)
        # Of this process: sums of perplexities and of mean NLLs, and their number
        self.sums = torch.zeros(3, num_examples, dtype=torch.float64)

    def check(self, state: TrainerState) -> None:
        """
        Refuse a run without a second epoch.

        Raises:
            `InputError`: If the run ends in its first epoch.
        """
        if state.num_train_epochs < 2:
            raise InputError(
                f"`confidence_source='online'` mixes from the second epoch on, but the run of {state.max_steps} steps "
                "ends in the first. Train longer, or choose another source."
            )

    def add(self, batch: AnnotatedBatch) -> None:
        """Add a micro-batch with the annotation `example_number`."""
        sample_ids = batch.sample_ids.cpu().flatten()
        sums = torch.zeros(2, batch.num_samples, dtype=torch.float64)
        sums[0].index_add_(0, sample_ids, -batch.log_probs.detach().cpu().double().flatten())
        sums[1].index_add_(0, sample_ids, batch.label_mask.cpu().double().flatten())
        numbers = torch.full((batch.num_samples,), -1)
        numbers.scatter_reduce_(0, sample_ids, batch.annotations["example_number"].cpu().flatten(), "amax")
        has_labels = (sums[1] > 0) & (numbers >= 0)
        nll = (sums[0] / sums[1])[has_labels]
        seen = torch.stack([torch.from_numpy(perplexity(nll.numpy())), nll, torch.ones_like(nll)])
        self.sums.index_add_(1, numbers[has_labels], seen)

    def begin_epoch(self, epoch: int, accelerator: Accelerator) -> torch.Tensor:
        """
        Split the examples for an epoch by what was seen before it. Must be called by all processes.

        Returns:
            `torch.Tensor` of shape `(num_examples,)`: `NEITHER` in the first epoch and for examples not seen yet.

        Raises:
            `InputError`: If an example's perplexity is NaN.
        """
        if epoch != self.epoch:  # the same after resuming within an epoch
            perplexity_sum, nll_sum, times = self._total(accelerator).numpy()
            wrong = np.flatnonzero(np.isnan(nll_sum))
            if len(wrong):
                raise InputError(
                    f"The perplexity of example {wrong[0]} of the prepared train dataset is NaN, and {len(wrong)} of "
                    f"{len(times)} are. Training has diverged: lower `learning_rate`, or look at the example."
                )
            with np.errstate(invalid="ignore"):  # 0 / 0 for examples not seen
                self.halves = split_in_halves(perplexity_sum / times, nll_sum / times, self.measure)
            self.epoch = epoch
        return self.halves

    def _total(self, accelerator: Accelerator) -> torch.Tensor:
        if accelerator.num_processes == 1:
            return self.sums
        return accelerator.reduce(self.sums.to(accelerator.device), "sum").cpu()

    def save(self, folder: str | Path, accelerator: Accelerator) -> None:
        """Write the state into a checkpoint. Must be called by all processes."""
        state = {"epoch": self.epoch, "halves": self.halves, "sums": self._total(accelerator)}
        if accelerator.is_main_process:
            Path(folder).mkdir(parents=True, exist_ok=True)
            torch.save(state, Path(folder) / STATE_FILE)

    def load(self, folder: str | Path, accelerator: Accelerator) -> None:
        """
        Read the state from a checkpoint.

        Raises:
            `InputError`: If it is missing, can't be read or belongs to another data set.
        """
        path = Path(folder) / STATE_FILE
        try:
            state = torch.load(path, weights_only=True)
            sums, self.halves, self.epoch = state["sums"], state["halves"], int(state["epoch"])
        except (OSError, RuntimeError, EOFError, UnpicklingError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} can't be read ({error!r}). Resume from another checkpoint.") from error
        if sums.shape != self.sums.shape:
            raise InputError(
                f"The checkpoint {folder} was made with {sums.size(1)} training examples, but there are "
                f"{self.sums.size(1)}. Resume with the same data set."
            )
        self.sums = sums if accelerator.is_main_process else torch.zeros_like(sums)
