import math
from functools import cached_property
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..lm_head.forward import LabelledOutput
from .batch import AnnotatedBatch, align_with_labels, without_rows_from


logger = get_logger(__name__)


class Ratio(NamedTuple):
    """A metric that is a sum divided by another; a pair in `batch.metrics` is one. Nothing is logged for 0 / 0."""

    numerator: torch.Tensor | float
    denominator: torch.Tensor | float
    combine = torch.sum

    def value(self) -> float | None:
        return self.numerator / self.denominator if self.denominator != 0 else None


class Minimum(NamedTuple):
    """A metric that is the smallest value; infinity where there is none, and then nothing is logged."""

    smallest: torch.Tensor | float
    combine = torch.amin

    def value(self) -> float | None:
        return self.smallest if math.isfinite(self.smallest) else None


class Maximum(NamedTuple):
    """A metric that is the largest value; minus infinity where there is none, and then nothing is logged."""

    largest: torch.Tensor | float
    combine = torch.amax

    def value(self) -> float | None:
        return self.largest if math.isfinite(self.largest) else None


class MetricSums:
    """
    Metrics since the last log, combined over micro-batches and processes before their value is computed: a mean of
    micro-batch means would depend on how the batch is split.
    """

    def __init__(self):
        self.totals = {"train": {}, "eval": {}}

    def add(self, mode: str, metrics: dict[str, tuple], accelerator: Accelerator) -> None:
        """
        Add a micro-batch of every process. All processes have to pass the same names.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            metrics (`dict[str, tuple]`):
                Name to a [`Ratio`] or a plain pair, a [`Minimum`], a [`Maximum`], or another named tuple of scalars
                with `combine` and `value`.
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
        """The metrics since the last call; one without a value is left out."""
        totals, self.totals[mode] = self.totals[mode], {}
        if mode == "train" and "nll" in totals and totals["nll"].denominator == 0:
            logger.warning("No token was in the loss since the last log: nothing was learned. Check the labels.")
        values = {name: metric.value() for name, metric in totals.items()}
        return {name: value for name, value in values.items() if value is not None}


class MetricSumsMixin:
    """Logs the metrics of a trainer's losses exactly, where `SFTTrainer` logs means over batches."""

    # Of the evaluation that is running, if there is one
    _metric_key_prefix: str | None = None

    @cached_property
    def _metric_sums(self) -> MetricSums:
        return MetricSums()

    def sum_metrics(self, batch: AnnotatedBatch, row_ids: torch.Tensor | None) -> None:
        """Add a micro-batch's metrics and `nll`. `row_ids`: row that each token comes from, if padding-free."""
        mode = "train" if self.model.training else "eval"
        if mode == "eval" and self.accelerator.num_processes > 1 and self.accelerator.gradient_state.end_of_dataloader:
            batch = self._without_repeated_rows(batch, row_ids)
        batch.metrics["nll"] = (-batch.log_probs.detach().sum(), batch.label_mask.sum())
        self._metric_sums.add(mode, batch.metrics, self.accelerator)

    def _without_repeated_rows(self, batch: AnnotatedBatch, row_ids: torch.Tensor | None) -> AnnotatedBatch:
        """
        The last batch of an evaluation set, for metrics: accelerate repeats rows in it to give all processes as many;
        gathered, it would begin with the `remainder` that is left of the data set.
        """
        remainder = self.accelerator.gradient_state.remainder
        if remainder < 0:
            logger.warning(
                "An evaluation set that is a stream has no length: of its last rows some may count twice in the "
                "metrics, where several processes share them out. Load it without streaming for exact metrics."
            )
        if remainder <= 0:
            return batch
        if row_ids is None:
            row_ids = torch.arange(len(batch.label_mask), device=batch.label_mask.device)[:, None]
        else:
            row_ids = align_with_labels(row_ids, batch.label_mask.size(1), -1)
        rows_before = (row_ids.max() + 1) * (self.accelerator.process_index // self.get_tp_size())
        batch = without_rows_from(batch, remainder - rows_before, row_ids, self.annotation_columns)
        self.compute_annotated_loss(batch)  # for its metrics
        return batch

    def log_as_sft_trainer(self, inputs: dict[str, Any], outputs: LabelledOutput) -> None:
        """Log what `SFTTrainer` logs of a micro-batch, under its names: it means them over micro-batches."""
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
        """Leave out of the next log what was computed so far."""
        self._metric_sums.take(mode)
        self._metrics[mode].clear()

    def begin_run(self, checkpoint):
        super().begin_run(checkpoint)
        for mode in ("train", "eval"):
            self.forget_metrics(mode)

    def log(self, logs, start_time=None):
        # Not by the model's mode alone: a callback may have evaluated, or predicted, in the midst of training
        if self._metric_key_prefix is not None:
            metrics = self._metric_sums.take("eval")
            logs.update({f"{self._metric_key_prefix}_{name}": mean for name, mean in metrics.items()})
        elif self.model.training or "loss" in logs:
            logs.update(self._metric_sums.take("train"))
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.forget_metrics("eval")  # `predict` leaves its own
        self._metric_key_prefix = metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._metric_key_prefix = None
