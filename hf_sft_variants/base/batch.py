from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from transformers import Trainer


# Row of the data set that each token of a padding-free batch comes from, counted from 0 in each batch
ROW_IDS = "row_ids"


class NumItems(dict):
    """Counts of an optimizer step, with an error that explains why a count is missing."""

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(
            f"The number of `{name}` in the optimizer step is not known, only {sorted(self)}: `num_items_in_batch` "
            "was given with a batch that does not come from `get_batch_samples`, or `count_items` does not count them."
        )


@dataclass
class AnnotatedBatch:
    """
    One micro-batch as the loss receives it: every tensor is aligned with the predicted token (the label).

    `L` is the number of predictions in a row: `sequence length - 1`, or more where prompt learning prepends virtual
    tokens.

    Attributes:
        log_probs (`torch.Tensor` of shape `(B, L)`):
            Log-probability of each label in nats, float32, zero where there is no label. The only field with a
            gradient.
        label_mask (`torch.Tensor` of shape `(B, L)`):
            `True` where there is a label.
        sample_ids (`torch.Tensor` of shape `(B, L)`):
            Number of the sample that each label belongs to, from `0` to `num_samples - 1`: the row, or the document of
            a packed or padding-free row.
        num_samples (`int`):
            Number of samples in this micro-batch, those without a label included.
        annotations (`dict[str, torch.Tensor]`):
            The annotation columns, each of shape `(B, L)`.
        num_items (`dict[str, torch.Tensor]`):
            Number of `"tokens"`, `"samples"` and of whatever else
            [`AnnotatedSFTTrainer.count_items`] counts, over the whole optimizer step (all micro-batches, all
            processes). Sums are divided by them, so 1 takes the place of 0.
        outputs ([`~hf_sft_variants.lm_head.forward.LabelledOutput`]):
            What the model returned.
        metrics (`dict[str, tuple]`):
            Filled by the loss: name to a pair (numerator, denominator), or to a [`~hf_sft_variants.base.Minimum`] or
            [`~hf_sft_variants.base.Maximum`]. Both parts of a pair are summed over all processes before they are
            divided. A metric whose denominator is zero is not logged.
    """

    log_probs: torch.Tensor
    label_mask: torch.Tensor
    sample_ids: torch.Tensor
    num_samples: int
    annotations: dict[str, torch.Tensor]
    num_items: NumItems
    outputs: Any
    metrics: dict[str, tuple] = field(default_factory=dict)


def align_with_labels(values: torch.Tensor, num_predictions: int, padding_value: float) -> torch.Tensor:
    """
    Align per-token values with predictions, from the right: the last prediction is about the last token.

    The first token of a row is predicted by nothing, so it is dropped; prompt learning prepends virtual tokens, which
    get `padding_value`.

    Args:
        values (`torch.Tensor` of shape `(B, T)`):
            One value for each token of `input_ids`.
        num_predictions (`int`):
            Number of predictions of a row, `L`.
        padding_value (`int` or `float`):
            Value for predictions without a token.

    Returns:
        `torch.Tensor` of shape `(B, L)`.
    """
    missing = num_predictions - values.size(1)
    if missing > 0:
        return F.pad(values, (missing, 0), value=padding_value)
    return values[:, -missing:]


def at_least_float32(log_probs: torch.Tensor) -> torch.Tensor:
    """Undo what FSDP2 does to a model's outputs: mixed precision rounds them, and a sum in bfloat16 stops growing."""
    return log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))


def sample_ids_of(inputs: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """
    Number the samples of a collated batch: one a row, or one a document of a padding-free row.

    Returns:
        `tuple[torch.Tensor, int]`: Sample of each token, shape `(B, T)`, and the number of samples.
    """
    if "position_ids" in inputs:  # padding-free: they begin again with each document
        starts = inputs["position_ids"] == 0
        return starts.flatten().cumsum(0).view_as(starts) - 1, int(starts.sum())
    num_rows, length = inputs["labels"].shape
    rows = torch.arange(num_rows, device=inputs["labels"].device)
    return rows[:, None].expand(num_rows, length), num_rows


def count_supervised_samples(inputs: dict[str, Any]) -> torch.Tensor:
    """Number of samples of a collated batch that have at least one label to predict."""
    sample_ids, num_samples = sample_ids_of(inputs)
    supervised = inputs["labels"][:, 1:] != -100
    labels_per_sample = torch.zeros(num_samples, dtype=torch.long, device=supervised.device)
    labels_per_sample.index_add_(0, sample_ids[:, 1:].flatten(), supervised.flatten().long())
    return (labels_per_sample > 0).sum()


def count_step_items(
    counts: Iterable[Mapping[str, torch.Tensor | int]], trainer: Trainer, device: torch.device
) -> dict[str, torch.Tensor]:
    """
    Sum the counts of an optimizer step over its micro-batches and over all processes, with one gather for all.

    Follows `Trainer._get_num_items_in_batch`, which counts tokens.
    """
    counts = list(counts)
    names = list(counts[0])
    if not names:
        return {}
    none = torch.zeros((), dtype=torch.long, device=device)
    totals = torch.stack(
        [sum((torch.as_tensor(count[name], device=device) for count in counts), none) for name in names]
    )
    if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
        # Not rounded, because a count may be a sum of weights
        totals = trainer.accelerator.gather(totals[None]).sum(0) / trainer.get_tp_size()
    return dict(zip(names, totals.unbind(), strict=True))


def _one_if_zero(count: torch.Tensor | float) -> torch.Tensor:
    """Replace 0, so that the loss of a batch with nothing to learn is 0 rather than 0 / 0."""
    count = torch.as_tensor(count)
    return count.masked_fill(count == 0, 1)


def make_annotated_batch(
    inputs: dict[str, Any],
    outputs: Any,
    annotations: dict[str, torch.Tensor],
    padding_values: dict[str, int | float],
    num_items: dict[str, torch.Tensor],
) -> AnnotatedBatch:
    """
    Align all tensors of a micro-batch with the predictions.

    Args:
        inputs (`dict[str, Any]`):
            Collated batch.
        outputs ([`~hf_sft_variants.lm_head.forward.LabelledOutput`]):
            What the model returned.
        annotations (`dict[str, torch.Tensor]`):
            Annotation columns, one value for each token of `input_ids`.
        padding_values (`dict[str, int | float]`):
            Annotation column to its value on padding.
        num_items (`dict[str, torch.Tensor]`):
            Counts of the optimizer step.
    """
    num_predictions = outputs.log_probs.size(1)
    sample_ids, num_samples = sample_ids_of(inputs)
    return AnnotatedBatch(
        log_probs=at_least_float32(outputs.log_probs),
        label_mask=outputs.label_mask,
        sample_ids=align_with_labels(sample_ids, num_predictions, 0),
        num_samples=num_samples,
        annotations={
            name: align_with_labels(values, num_predictions, padding_values[name])
            for name, values in annotations.items()
        },
        num_items=NumItems({name: _one_if_zero(count) for name, count in num_items.items()}),
        outputs=outputs,
    )


def without_rows_from(
    batch: AnnotatedBatch, first: int | torch.Tensor, row_ids: torch.Tensor, padding_values: dict[str, int | float]
) -> AnnotatedBatch:
    """
    Copy a micro-batch with its last rows turned into padding: no labels, annotations at their padding values.

    Args:
        batch ([`AnnotatedBatch`]):
            Micro-batch to copy.
        first (`int` or scalar `torch.Tensor`):
            Number of the first row to leave out.
        row_ids (`torch.Tensor` of shape `(B, L)` or `(B, 1)`):
            Row of the data set that each label belongs to.
        padding_values (`dict[str, int | float]`):
            Annotation column to its value on padding.
    """
    left_out = row_ids >= first
    return replace(
        batch,
        log_probs=batch.log_probs.masked_fill(left_out, 0),
        label_mask=batch.label_mask & ~left_out,
        annotations={
            name: values.masked_fill(left_out, padding_values[name]) for name, values in batch.annotations.items()
        },
        metrics={},
    )
