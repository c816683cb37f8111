"""Stages of a training run: when each begins, and its learning rates."""

import math
from bisect import bisect_right
from functools import partial
from itertools import accumulate, pairwise

import torch
from accelerate.logging import get_logger
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, get_scheduler
from transformers.trainer_callback import ExportableState

from ..errors import InputError
from .config import SFTKeyConfig


logger = get_logger(__name__)

# Schedules by the evaluation loss, not by the step
_SCHEDULES_BY_LOSS = ("reduce_lr_on_plateau", "greedy")
# Optimizers with state that a reset does not reach
_STATE_ELSEWHERE = ("schedule_free", "layerwise", "lomo")


def stage_starts(fractions: list[float], max_steps: int) -> list[int]:
    """
    Optimizer step that each stage begins with, followed by the total number of steps. Raises an `InputError` if a
    stage would have no step.
    """
    starts = [0, *(round(share * max_steps) for share in accumulate(fractions[:-1])), max_steps]
    for number, (start, end) in enumerate(pairwise(starts)):
        if end <= start:
            raise InputError(
                f"`stage_fractions={fractions}` of {max_steps} optimizer steps leave stage {number + 1} without a "
                "step. Train longer (`num_train_epochs`, `max_steps`), with smaller batches, or with fewer stages."
            )
    return starts


def stage_at(step: int, fractions: list[float], max_steps: int) -> int:
    """Number, from 0, of the stage that an optimizer step belongs to."""
    return bisect_right(stage_starts(fractions, max_steps)[:-1], step) - 1


def staged_scheduler(optimizer: torch.optim.Optimizer, args: SFTKeyConfig, max_steps: int) -> LambdaLR:
    """
    Learning-rate schedule of a run in stages, each with its own warm-up and peak learning rate. The rate depends only
    on the step, so a resumed run continues with the same rates. Raises an `InputError` for schedules that depend on
    the evaluation loss, and if a stage would have no step.
    """
    if args.lr_scheduler_type in _SCHEDULES_BY_LOSS:
        raise InputError(
            f"`lr_scheduler_type={args.lr_scheduler_type.value!r}` is not supported with several stages, whose "
            "learning rates depend on the step. Choose one such as 'linear' or 'cosine'."
        )
    starts = stage_starts(args.stage_fractions, max_steps)
    peaks = args.stage_learning_rates or [args.learning_rate] * len(args.stages)
    factors = []
    for peak, start, end in zip(peaks, starts[:-1], starts[1:], strict=True):
        # Only the schedule's function is used, but some of them read the peak from their optimizer
        stand_in = torch.optim.SGD([torch.zeros(1)], lr=peak)
        schedule = get_scheduler(
            args.lr_scheduler_type,
            stand_in,
            num_warmup_steps=args.get_warmup_steps(end - start),
            num_training_steps=end - start,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        factors.append((peak / args.learning_rate if args.stage_learning_rates else 1.0, schedule.lr_lambdas[0]))
    return LambdaLR(optimizer, partial(_staged_factor, starts=starts[:-1], factors=factors))


def _staged_factor(step: int, starts: list[int], factors: list) -> float:
    stage = bisect_right(starts, step) - 1
    scale, schedule = factors[stage]
    return scale * schedule(step - starts[stage])


class StageSwitchCallback(TrainerCallback, ExportableState):
    """
    A [`~transformers.TrainerCallback`] that starts the stages of a run: it resets the optimizer at a boundary and logs
    before it, so that the metrics of two stages are not mixed.

    [`SFTKeyTrainer`] adds it by itself. The loss and the learning rate follow from the step, so nothing has to be
    restored when a run is resumed. The checkpoint has the steps at which its stages begin, because a run with other
    stages can't resume from it.
    """

    def __init__(self):
        self._starts = []

    def state(self) -> dict:
        return {"args": {}, "attributes": {"_starts": self._starts}}

    def on_train_begin(self, args: SFTKeyConfig, state, control, train_dataloader=None, **kwargs):
        self._starts = stage_starts(args.stage_fractions, state.max_steps)
        if state.global_step > 0:
            self._require_same_starts(state)
        if len(args.stages) == 1:
            return
        if args.reset_optimizer and any(name in args.optim for name in _STATE_ELSEWHERE):
            raise InputError(
                f"`reset_optimizer=True` can't reset `optim={args.optim.value!r}`, which keeps its state elsewhere. "
                "Set `reset_optimizer=False` or choose another `optim`."
            )
        self._warn_about_boundaries(args, train_dataloader)

    def _require_same_starts(self, state):
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        starts = saved.get("_starts", self._starts)
        if starts[:-1] != self._starts[:-1]:
            raise InputError(
                f"The checkpoint's stages begin at the optimizer steps {starts[:-1]}, but those of this run at "
                f"{self._starts[:-1]}. Keep `num_train_epochs`, `max_steps` and the batch size, or start from the "
                "beginning."
            )

    def _warn_about_boundaries(self, args, train_dataloader):
        try:
            steps_per_epoch = max(math.ceil(len(train_dataloader) / args.gradient_accumulation_steps), 1)
        except TypeError:  # a stream has no length
            return
        inside = [start for start in self._starts[1:-1] if start % steps_per_epoch]
        if inside:
            logger.warning(
                f"A stage begins at optimizer step {inside[0]}, inside an epoch of {steps_per_epoch} steps, so the "
                "stages do not see the same examples equally often. Choose `num_train_epochs` and `stage_fractions` "
                "so that each stage has whole epochs."
            )

    def on_step_begin(self, args: SFTKeyConfig, state, control, optimizer=None, **kwargs):
        if state.global_step not in self._starts[:-1]:
            return
        number = self._starts.index(state.global_step)
        logger.info(f"Stage {number + 1} of {len(args.stages)}, {args.stages[number]!r}, begins.")
        if number > 0 and args.reset_optimizer:
            reset_state(optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self._starts[1:-1] and args.logging_strategy != "no":
            control.should_log = True


def reset_state(optimizer: torch.optim.Optimizer) -> None:
    """Forget moments and step counts, including those of an optimizer wrapped by accelerate or DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    optimizer.state.clear()
