import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..lm_head.forward import LabelledOutput
from .batch import AnnotatedBatch, align_with_labels, without_rows_from


logger = get_logger(__name__)


class Ratio(NamedTuple):
    """Metric that is the ratio of two sums, such as a pair in `batch.metrics`. Not logged if the denominator is 0."""

    numerator: torch.Tensor | float
    denominator: torch.Tensor | float

    @property
    def combine(self) -> Callable[..., torch.Tensor]:
        return torch.sum

    def value(self) -> float | None:
        return float(self.numerator / self.denominator) if self.denominator != 0 else None


class Minimum(NamedTuple):
    """Metric that is the smallest value. Infinity marks a missing value, and is not logged."""

    smallest: torch.Tensor | float

    @property
    def combine(self) -> Callable[..., torch.Tensor]:
        return torch.amin

    def value(self) -> float | None:
        return float(self.smallest) if math.isfinite(self.smallest) else None


class Maximum(NamedTuple):
    """Metric that is the largest value. Minus infinity marks a missing value, and is not logged."""

    largest: torch.Tensor | float

    @property
    def combine(self) -> Callable[..., torch.Tensor]:
        return torch.amax

    def value(self) -> float | None:
        return float(self.largest) if math.isfinite(self.largest) else None


class MetricSums:
    """
    Accumulates metrics since the last log over micro-batches and processes before computing their values: a mean of
    micro-batch means would depend on how the batch is split.
    """

    def __init__(self):
        self.totals = {"train": {}, "eval": {}}

    def add(self, mode: str, metrics: dict[str, tuple], accelerator: Accelerator) -> None:
        """
        Add one micro-batch from every process. All processes must pass the same names.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            metrics (`dict[str, tuple]`):
                Maps each name to a [`Ratio`] or a plain pair, a [`Minimum`], a [`Maximum`], or another named tuple of
                scalars with `combine` and `value`.
            accelerator ([`~accelerate.Accelerator`]):
                Gathers the scalars.
        """
        metrics = {name: Ratio(*metric) if type(metric) is tuple else metric for name, metric in metrics.items()}
        device = accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        scalars = [torch.as_tensor(value, device=device).to(dtype) for metric in metrics.values() for value in metric]
        gathered = accelerator.gather(torch.stack(scalars)[None]).cpu()
        sizes = [len(metric) for metric in metrics.values()]
        for (name, metric), values in zip(metrics.items(), gathered.split(sizes, dim=1), strict=True):
            if name in self.totals[mode]:
                values = torch.cat([torch.tensor([self.totals[mode][name]], dtype=dtype), values])
            self.totals[mode][name] = type(metric)(*metric.combine(values, dim=0).tolist())

    def take(self, mode: str) -> dict[str, float]:
        """Return the metrics since the last call, without those that have no value, and reset them."""
        totals, self.totals[mode] = self.totals[mode], {}
        if mode == "train" and "nll" in totals and totals["nll"].denominator == 0:
            logger.warning("No token was in the loss since the last log, so nothing was learned. Check the labels.")
        values = {name: metric.value() for name, metric in totals.items()}
        return {name: value for name, value in values.items() if value is not None}


class MetricSumsMixin:
    """Logs exact metrics of a trainer's loss, where `SFTTrainer` logs means over batches."""

    # Set while an evaluation is running
    _metric_key_prefix: str | None = None

    @cached_property
    def _metric_sums(self) -> MetricSums:
        return MetricSums()

    def sum_metrics(self, batch: AnnotatedBatch, row_ids: torch.Tensor | None) -> None:
        """Add a micro-batch's metrics and `nll`. `row_ids` has each token's row if the batch is padding-free."""
        mode = "train" if self.model.training else "eval"
        if mode == "eval" and self.accelerator.num_processes > 1 and self.accelerator.gradient_state.end_of_dataloader:
            batch = self._without_repeated_rows(batch, row_ids)
        batch.metrics["nll"] = (-batch.log_probs.detach().sum(), batch.label_mask.sum())
        batch.metrics |= self.metrics_by_source(batch)
        self._metric_sums.add(mode, batch.metrics, self.accelerator)

    def _without_repeated_rows(self, batch: AnnotatedBatch, row_ids: torch.Tensor | None) -> AnnotatedBatch:
        """
        Remove repeated rows from the last batch of an evaluation set, for the metrics. Accelerate repeats rows to give
        all processes equally many; gathered over them, the batch would begin with the `remainder` of the data set.
        """
        remainder = self.accelerator.gradient_state.remainder
        if remainder < 0:
            logger.warning(
                "The evaluation set is a stream, whose length is unknown: with several processes, some of its last "
                "rows may count twice in the metrics. Load it without streaming for exact metrics."
            )
        if remainder <= 0:
            return batch
        if row_ids is None:
            row_ids = torch.arange(len(batch.label_mask), device=batch.label_mask.device)[:, None]
        else:
            row_ids = align_with_labels(row_ids, batch.label_mask.size(1), -1)
        rows_before = (row_ids.max() + 1) * (self.accelerator.process_index // self.get_tp_size())
        batch = without_rows_from(batch, remainder - rows_before, row_ids, self.token_columns)
        self.compute_annotated_loss(batch)  # for its metrics
        return batch

    def log_as_sft_trainer(self, inputs: dict[str, Any], outputs: LabelledOutput) -> None:
        """Log `SFTTrainer`'s own metrics of a micro-batch, averaged over micro-batches as it does."""
        mode = "train" if self.model.training else "eval"
        if "attention_mask" in inputs:
            num_tokens = inputs["attention_mask"].sum()
        else:  # padding-free
            num_tokens = outputs.label_mask.new_full((), inputs["input_ids"].size(1), dtype=torch.long)
        scalars = [outputs.label_mask.sum(), outputs.entropy.sum(), outputs.is_top1.sum(), num_tokens]
        sums = self.accelerator.gather_for_metrics(torch.stack([scalar.float() for scalar in scalars])[None]).sum(0)
        num_labels, entropy, num_correct, num_tokens = sums
        metrics = self._metrics[mode]
        metrics["entropy"].append((entropy / num_labels.clamp(min=1)).item())
        metrics["mean_token_accuracy"].append((num_correct / num_labels.clamp(min=1)).item())
        if mode == "train":
            self._total_train_tokens += int(num_tokens) // self.get_tp_size()
        metrics["num_tokens"] = [self._total_train_tokens]
        if outputs.aux_loss is not None:
            metrics["aux_loss"].append(self.accelerator.gather_for_metrics(outputs.aux_loss).mean().item())

    def forget_metrics(self, mode: str) -> None:
        """Discard the metrics accumulated since the last log."""
        self._metric_sums.take(mode)
        self._metrics[mode].clear()

    def begin_run(self, checkpoint: str | None) -> None:
        super().begin_run(checkpoint)
        for mode in ("train", "eval"):
            self.forget_metrics(mode)

    def log(self, logs, start_time=None):
        # The model's mode is not enough: a callback may have evaluated or predicted in the middle of training
        if self._metric_key_prefix is not None:
            metrics = self._metric_sums.take("eval")
            logs.update({f"{self._metric_key_prefix}_{name}": mean for name, mean in metrics.items()})
        elif self.model.training or "loss" in logs:
            logs.update(self._metric_sums.take("train"))
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.forget_metrics("eval")  # `predict` leaves some behind
        self._metric_key_prefix = metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._metric_key_prefix = None
