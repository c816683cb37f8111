import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from .batch import AnnotatedBatch, Ratio, align_with_labels, without_rows_from


logger = get_logger(__name__)


class MetricSums:
    """
    Metrics as sums over micro-batches and processes, divided when they are logged: a mean of micro-batch means would
    depend on how the batch is cut.
    """

    def __init__(self):
        self.sums = {"train": {}, "eval": {}}

    def add(self, mode: str, metrics: dict[str, Ratio], accelerator: Accelerator) -> None:
        """
        Add a micro-batch of every process. All have to bring the same names.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            metrics (`dict[str, tuple]`):
                Name to numerator and denominator, numbers or scalar tensors.
            accelerator ([`~accelerate.Accelerator`]):
                Gathers the sums.
        """
        device = accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        values = [torch.as_tensor(value, device=device).to(dtype) for pair in metrics.values() for value in pair]
        values = accelerator.gather(torch.stack(values)[None]).sum(0).view(-1, 2).tolist()
        for name, (numerator, denominator) in zip(metrics, values, strict=True):
            total = self.sums[mode].setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + numerator, total[1] + denominator

    def take(self, mode: str) -> dict[str, float]:
        """The metrics since the last call; one whose denominator is zero is left out."""
        sums, self.sums[mode] = self.sums[mode], {}
        if mode == "train" and sums.get("nll", (0, 1))[1] == 0:
            logger.warning("No token was in the loss since the last log: nothing was learned. Check the labels.")
        return {name: numerator / denominator for name, (numerator, denominator) in sums.items() if denominator != 0}


class MetricSumsMixin:
    """Logs the metrics of a trainer's losses as sums, where `SFTTrainer` logs means over batches."""

    metric_sums_class = MetricSums

    # Of the evaluation that is going on; between two there is none
    _metric_key_prefix: str | None = None

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
