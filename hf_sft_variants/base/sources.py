"""Metrics by the value of a column, such as the source of each row."""

from functools import cached_property
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from ..errors import InputError
from .batch import AnnotatedBatch
from .preparation import map_description
from .trl_internals import get_dataset_column_names


# Limits the number of metrics, and catches a column of texts
MAX_SOURCES = 64

SOURCE_IDS = "source_ids"

RAW_ROWS = "pass the raw, unprepared rows"


class MetricsBySourceMixin:
    """Numbers the values of the column `metrics_by`, over all data sets of a trainer."""

    @property
    def _metrics_by(self) -> str | None:
        return getattr(self.args, "metrics_by", None)  # a variant's configuration may extend `SFTConfig` alone

    @property
    def token_columns(self) -> dict[str, int | float]:
        """The annotation columns, and with `metrics_by` that of the sources' numbers."""
        return {**self.annotation_columns, **({} if self._metrics_by is None else {SOURCE_IDS: -1})}

    @cached_property
    def _sources(self) -> dict[str, int]:
        return {}

    def describe_sources(self) -> dict[str, Any]:
        """The column and its values in the order of their numbers, to record with a prepared data set."""
        return (
            {} if self._metrics_by is None else {"sources": {"column": self._metrics_by, "values": [*self._sources]}}
        )

    def adopt_sources(self, made_with: dict[str, Any] | None, dataset_name: str) -> None:
        """
        Take over the numbering of a prepared data set. Raises an `InputError` if it has none of this column, or
        another.
        """
        if self._metrics_by is None:
            return
        sources = (made_with or {}).get("sources", {})
        if sources.get("column") != self._metrics_by:
            raise InputError(
                f"The {dataset_name} dataset was not prepared with `metrics_by={self._metrics_by!r}`, or was joined "
                "from sets with other values, so nothing says where its tokens come from. Remove `metrics_by`, or "
                f"{RAW_ROWS}."
            )
        for number, value in enumerate(sources["values"]):
            if self._sources.setdefault(value, len(self._sources)) != number:
                raise InputError(
                    f"The {dataset_name} dataset was prepared with other numbers of the values of "
                    f"`metrics_by={self._metrics_by!r}`: {RAW_ROWS}."
                )

    def number_sources(self, dataset: Dataset | IterableDataset, dataset_name: str) -> None:
        """Number the values of `metrics_by`, including those of rows that are dropped later."""
        column = self._metrics_by
        if column is None:
            return
        for value in _values(dataset, column, self.args.dataset_text_field, dataset_name):
            self._sources.setdefault(value, len(self._sources))
        if len(self._sources) > MAX_SOURCES:
            raise InputError(
                f"`metrics_by={column!r}` has {len(self._sources)} different values, such as "
                f"{next(iter(self._sources))!r}, but at most {MAX_SOURCES} can have metrics of their own. Name a "
                "column with fewer."
            )

    def add_sources(self, dataset: Dataset | IterableDataset, dataset_name: str) -> Dataset | IterableDataset:
        """Add the column `source_ids`: for each token, the number of its row's value."""
        if self._metrics_by is None:
            return dataset
        fn_kwargs = {"column": self._metrics_by, "numbers": dict(self._sources)}
        map_kwargs = map_description(dataset, self.args, f"Numbering sources of {dataset_name} dataset")
        return dataset.map(_add_source_ids, fn_kwargs=fn_kwargs, **map_kwargs)

    def metrics_by_source(self, batch: AnnotatedBatch) -> dict[str, tuple]:
        """For `batch.metrics`; all processes have the same names, also of sources that are not in their batch."""
        if self._metrics_by is None:
            return {}
        ids = batch.annotations[SOURCE_IDS].masked_fill(~batch.label_mask, -1) + 1  # 0 for tokens without a label
        zeros = batch.log_probs.new_zeros(len(self._sources) + 1)
        nll = zeros.index_add(0, ids.flatten(), -batch.log_probs.detach().flatten())
        counts = torch.bincount(ids.flatten(), minlength=len(zeros))
        total = counts[1:].sum()
        metrics = {}
        for value, number in self._sources.items():
            metrics[f"nll/{value}"] = (nll[number + 1], counts[number + 1])
            metrics[f"token_share/{value}"] = (counts[number + 1], total)
        return metrics


def _values(dataset: Dataset | IterableDataset, column: str, text_field: str, dataset_name: str) -> list[str]:
    if isinstance(dataset, IterableDataset):
        raise InputError(
            f"The {dataset_name} dataset is a stream, but `metrics_by={column!r}` needs all values of the column "
            "beforehand. Load it without streaming."
        )
    columns = get_dataset_column_names(dataset)
    if column in ("prompt", "completion", text_field):
        raise InputError(
            f"`metrics_by={column!r}` names a text to train on. Name a column that says where each row comes from."
        )
    if column not in columns:
        raise InputError(
            f"The {dataset_name} dataset has no column `{column}`, which `metrics_by` names; it has {columns}."
        )
    dtype = str(getattr(dataset.features[column], "dtype", None))
    if not dtype.startswith(("string", "large_string", "int", "uint")):
        raise InputError(
            f"Column `{column}` of the {dataset_name} dataset, which `metrics_by` names, has {dataset[0][column]!r}: "
            "give a text or an integer in each row."
        )
    values = dataset.unique(column)
    if None in values:
        row = dataset[column][:].index(None)
        raise InputError(
            f"Row {row} of the {dataset_name} dataset has no value in `{column}`, which `metrics_by` names."
        )
    return sorted(set(map(str, values)))


def _add_source_ids(example: dict[str, Any], column: str, numbers: dict[str, int]) -> dict[str, list[int]]:
    return {SOURCE_IDS: [numbers[str(example[column])]] * len(example["input_ids"])}
