from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from .batch import ROW_IDS
from .prepared_sets import MADE_WITH


@dataclass
class AnnotationCollator:
    """
    Adds the annotation columns to the batches of another collator, and `row_ids` to padding-free batches: a packed row
    has several documents, whose boundaries don't show where the row ends.

    `collator` is TRL's or the user's own. It does not see the annotations, and must keep each row's tokens at the
    start of the row (pad on the right) or, if padding-free, concatenate the rows in order. `padding_values` maps each
    annotation column to its padding value: the column is float32 if this is a float, and int64 if it is an integer.
    Raises an `InputError` if the collator moves tokens, an annotation does not have one value for each token, or an
    int64 column has fractions.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    padding_values: dict[str, int | float]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        unseen = {MADE_WITH, *self.padding_values}
        # Collators that pad every column, such as those of transformers, would fail on the annotations
        batch = self.collator(
            [{name: example[name] for name in example if name not in unseen} for example in examples]
        )
        token_ids = [torch.as_tensor(example["input_ids"]) for example in examples]
        shape = batch["input_ids"].shape
        self._check_tokens_kept(batch["input_ids"], [torch.cat(token_ids)] if shape[0] == 1 else token_ids)
        for name, padding_value in self.padding_values.items():
            rows = [self._annotation(example, name, isinstance(padding_value, float)) for example in examples]
            batch[name] = self._pad(rows, padding_value, shape)
        if shape[0] < len(examples):  # padding-free
            batch[ROW_IDS] = self._pad([torch.full_like(ids, row) for row, ids in enumerate(token_ids)], -1, shape)
        return batch

    @staticmethod
    def _pad(rows: list[torch.Tensor], padding_value: int | float, shape: torch.Size) -> torch.Tensor:
        if shape[0] == 1:  # padding-free, or a single row
            rows = [torch.cat(rows)]
        padded = torch.full(shape, padding_value, dtype=rows[0].dtype)
        for row, values in enumerate(rows):
            padded[row, : len(values)] = values
        return padded

    @staticmethod
    def _annotation(example: dict[str, Any], name: str, is_float: bool) -> torch.Tensor:
        if name not in example:
            raise InputError(
                f"The data set has no column `{name}`. The trainer adds it when it prepares a data set; with "
                "`skip_prepare_dataset=True`, the data set must already have it, with one value for each token."
            )
        values = torch.as_tensor(example[name])
        if len(values) != len(example["input_ids"]):
            raise InputError(
                f"Column `{name}` has {len(values)} values in an example of {len(example['input_ids'])} tokens. It "
                "needs one value for each token of `input_ids`."
            )
        if values.is_floating_point() and not is_float:
            raise InputError(
                f"Column `{name}` has fractions, but its padding value is an integer. Use a float, such as 0.0, in "
                "`annotation_columns`."
            )
        return values.float() if is_float else values.long()

    @staticmethod
    def _check_tokens_kept(batch_input_ids: torch.Tensor, token_ids: list[torch.Tensor]) -> None:
        same_rows = len(token_ids) == batch_input_ids.size(0)
        if not same_rows or any(
            len(ids) > batch_input_ids.size(1) or not torch.equal(batch_input_ids[row, : len(ids)], ids)
            for row, ids in enumerate(token_ids)
        ):
            raise InputError(
                "The `data_collator` moves, drops or changes tokens, so per-token annotations can't follow them. Use "
                "one that pads on the right, or leave `data_collator` unset."
            )
