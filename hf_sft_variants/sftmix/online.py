from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from ..base import AnnotatedBatch
from ..errors import InputError
from .confidence_file import perplexity
from .pairing import NEITHER, split_in_halves


class OnlineConfidence(TrainerCallback):
    """
    Splits the examples of an [`SFTMixTrainer`] before each epoch by their mean NLL and perplexity over the epochs so
    far, taken from the log-probabilities that training computes anyway. Approximates [`ConfidenceTrackingCallback`]:
    examples early in an epoch are seen by less trained weights than later ones, and with dropout.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._reset()

    def _reset(self) -> None:
        # Of this process: sums of perplexities and of mean NLLs, and their number
        self.sums = torch.zeros(3, len(self.trainer.train_examples), dtype=torch.float64)
        self.trainer.halves = torch.full((self.sums.size(1),), NEITHER, dtype=torch.int8)

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

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.num_train_epochs < 2:
            raise InputError(
                f"`confidence_source='online'` mixes from the second epoch on, but the run of {state.max_steps} steps "
                "ends in the first. Train longer, or choose another source."
            )
        if state.global_step == 0:
            self._reset()  # a new run, whatever this trainer has trained before
        elif state.epoch.is_integer():  # otherwise the run is resumed within the epoch
            self._split()

    def _split(self) -> None:
        perplexity_sum, nll_sum, times = self._total().numpy()
        wrong = np.flatnonzero(np.isnan(nll_sum))
        if len(wrong):
            raise InputError(
                f"The perplexity of example {wrong[0]} of the prepared train dataset is NaN, and {len(wrong)} of "
                f"{len(times)} are. Training has diverged: lower `learning_rate`, or look at the example."
            )
        with np.errstate(invalid="ignore"):  # 0 / 0 for examples not seen
            means = perplexity_sum / times, nll_sum / times
        self.trainer.halves = split_in_halves(*means, self.trainer.args.confidence_measure)

    def _total(self) -> torch.Tensor:
        """The sums of all processes, which must call it at once."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:  # not all devices have float64
            return self.sums
        return accelerator.reduce(self.sums.to(accelerator.device), "sum").cpu()

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint. Must be called by all processes."""
        state = {"halves": self.trainer.halves, "sums": self._total()}
        if self.trainer.accelerator.is_main_process:
            checkpoint.mkdir(parents=True, exist_ok=True)
            torch.save(state, _state_file(checkpoint))

    def load(self, checkpoint: str) -> None:
        """
        Read the state from a checkpoint. Raises an `InputError` if it can't be read or belongs to another data set.
        """
        path = _state_file(checkpoint)
        try:
            state = torch.load(path, weights_only=True)
            halves, sums = state["halves"], state["sums"]
        except (OSError, RuntimeError, EOFError, UnpicklingError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} can't be read ({error!r}). Resume from another checkpoint.") from error
        if sums.shape != self.sums.shape:
            raise InputError(
                f"The checkpoint {checkpoint} was made with {sums.size(1)} training examples, but there are "
                f"{self.sums.size(1)}. Resume with the same data set."
            )
        self.trainer.halves = halves
        self.sums = sums if self.trainer.accelerator.is_main_process else torch.zeros_like(sums)


def _state_file(checkpoint: str | Path) -> Path:
    return Path(checkpoint, "sftmix_online.pt")
