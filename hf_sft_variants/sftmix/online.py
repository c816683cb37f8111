from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from accelerate import Accelerator
from transformers import TrainerState

from ..base import AnnotatedBatch
from ..errors import InputError
from .confidence_file import perplexity
from .pairing import NEITHER, split_in_halves


class OnlineConfidence:
    """
    Confidence from the log-probabilities that training computes anyway: means of each example's NLL and perplexity
    over the epochs so far.

    Approximates [`ConfidenceTrackingCallback`]: examples early in an epoch are seen by less trained weights than later
    ones, and with dropout.

    Args:
        num_examples (`int`):
            Number of training examples.
        measure (`str`):
            `"perplexity"` or `"mean_nll"`.
    """

    def __init__(self, num_examples: int, measure: str):
        self.num_examples = num_examples
        self.measure = measure
        self._reset()

    def _reset(self) -> None:
        self.epoch = 0
        self.halves = torch.full((self.num_examples,), NEITHER, dtype=torch.int8)
        # Of this process: sums of perplexities and of mean NLLs, and their number
        self.sums = torch.zeros(3, self.num_examples, dtype=torch.float64)

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

    def begin_epoch(self, state: TrainerState, accelerator: Accelerator) -> torch.Tensor:
        """
        Split the examples for an epoch by what was seen before it. Must be called by all processes.

        Returns:
            `torch.Tensor` of shape `(num_examples,)`: `NEITHER` in the first epoch and for examples not seen yet.

        Raises:
            `InputError`: If the run ends in its first epoch, or an example's perplexity is NaN.
        """
        if state.num_train_epochs < 2:
            raise InputError(
                f"`confidence_source='online'` mixes from the second epoch on, but the run of {state.max_steps} steps "
                "ends in the first. Train longer, or choose another source."
            )
        if state.global_step == 0:
            self._reset()  # a new run, whatever this trainer has trained before
        epoch = int(state.epoch)
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
        if accelerator.num_processes == 1:  # not all devices have float64
            return self.sums
        return accelerator.reduce(self.sums.to(accelerator.device), "sum").cpu()

    def save(self, checkpoint: Path, accelerator: Accelerator) -> None:
        """Write the state into a checkpoint. Must be called by all processes."""
        state = {"epoch": self.epoch, "halves": self.halves, "sums": self._total(accelerator)}
        if accelerator.is_main_process:
            checkpoint.mkdir(parents=True, exist_ok=True)
            torch.save(state, _state_file(checkpoint))

    def load(self, checkpoint: str, accelerator: Accelerator) -> None:
        """
        Read the state from a checkpoint.

        Raises:
            `InputError`: If it is missing, can't be read or belongs to another data set.
        """
        path = _state_file(checkpoint)
        try:
            state = torch.load(path, weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            raise InputError(f"{path} can't be read ({error!r}). Resume from another checkpoint.") from error
        if len(state["halves"]) != self.num_examples:
            raise InputError(
                f"The checkpoint {checkpoint} was made with {len(state['halves'])} training examples, but there are "
                f"{self.num_examples}. Resume with the same data set."
            )
        self.epoch, self.halves = state["epoch"], state["halves"]
        self.sums = state["sums"] if accelerator.is_main_process else torch.zeros_like(state["sums"])


def _state_file(checkpoint: str | Path) -> Path:
    return Path(checkpoint, "sftmix_online.pt")
