"""Checks of rows that the user passes as tokens, on Arrow tables."""

from collections.abc import Iterator
from reprlib import repr as short
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from ..errors import InputError


TOKEN_COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks", "seq_lengths")
_MASKS = ("completion_mask", "assistant_masks")

# Without values a list has no type yet
_INTEGERS = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)

_ROWS_PER_TABLE = 1000


def check_token_rows(
    dataset: Dataset | IterableDataset, columns: list[str], num_ids: int, dataset_name: str
) -> Dataset | IterableDataset:
    """
    Check every row of a data set of tokens; the rows of a stream as they arrive. `columns` are those of
    `TOKEN_COLUMNS` that it has, and `num_ids` is the tokenizer's largest id plus 1. Raises an `InputError` that names
    a row that can't be trained on.
    """
    options = {"num_ids": num_ids, "dataset_name": dataset_name}
    if isinstance(dataset, IterableDataset):
        return dataset.map(_check_row, with_indices=True, fn_kwargs={"columns": columns, **options})
    tables = dataset.select_columns(columns).with_format("arrow").iter(_ROWS_PER_TABLE)
    for number, table in enumerate(tables):
        arrays = {name: table[name].combine_chunks() for name in columns}
        _check_columns(arrays, number * _ROWS_PER_TABLE, **options)
    return dataset


def _check_row(example: dict[str, Any], row: int, columns: list[str], **options: Any) -> dict[str, Any]:
    # A generator may yield arrays, which no data set on disk does
    example = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in example.items()}
    arrays = {name: _as_array(name, example[name], row, options["dataset_name"]) for name in columns}
    _check_columns(arrays, row, **options)
    return example


def _as_array(name: str, value: Any, row: int, dataset_name: str) -> pa.Array:
    try:
        # A generator may yield arrays, or lists of numbers of several types
        values = np.asarray(value)
        return pa.array([values if values.ndim == 1 and values.dtype.kind in "iub" else value])
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise InputError(
            f"Row {row} of the {dataset_name} dataset: `{name}` has {short(value)}; give a list of integers, one for "
            "each token."
        ) from error


def _check_columns(columns: dict[str, pa.Array], first_row: int, num_ids: int, dataset_name: str) -> None:
    for row, problem in _problems(columns, num_ids):
        raise InputError(f"Row {first_row + row} of the {dataset_name} dataset: {problem}.")


def _problems(columns: dict[str, pa.Array], num_ids: int) -> Iterator[tuple[int, str]]:
    """Yield rows and what is wrong with them. Each check relies on those before it."""
    for name, column in columns.items():
        for row, value in _not_integers(column):
            yield row, f"`{name}` has {short(value)}; give a list of integers, one for each token"
    lengths = {name: pc.list_value_length(column).to_numpy() for name, column in columns.items()}
    num_tokens = lengths["input_ids"]
    masks = [name for name in _MASKS if name in columns]
    ids = [name for name in ("input_ids", "labels") if name in columns]
    for name in [*ids[1:], *masks]:
        for row in np.flatnonzero(lengths[name] != num_tokens):
            found, wanted = lengths[name][row], num_tokens[row]
            yield row, f"`{name}` has {found} values, but `input_ids` has {wanted} tokens; give one for each"
    values = {name: pc.list_flatten(column).to_numpy(zero_copy_only=False) for name, column in columns.items()}
    rows = {name: np.repeat(np.arange(len(num_tokens)), lengths[name]) for name in columns}
    if "seq_lengths" in columns:
        sums = np.bincount(rows["seq_lengths"], values["seq_lengths"], len(num_tokens)).astype(int)
        for row in np.flatnonzero(sums != num_tokens):
            yield row, f"`seq_lengths` adds up to {sums[row]}, but `input_ids` has {num_tokens[row]} tokens"
    for name in ids:
        is_id = (values[name] >= 0) & (values[name] < num_ids)
        for i in np.flatnonzero(~is_id & ((values[name] != -100) | (name == "input_ids"))):
            found = f"`{name}` has {values[name][i]}, which is not an id of the tokenizer (0 to {num_ids - 1})"
            yield rows[name][i], f"{found}. Pass the tokenizer that made the tokens as `processing_class`"
    for name in masks:
        for i in np.flatnonzero((values[name] != 0) & (values[name] != 1)):
            found = values[name][i]
            yield rows[name][i], f"`{name}` has {found}; give 1 on the tokens of the loss and 0 on others"


def _not_integers(column: pa.Array) -> Iterator[tuple[int, Any]]:
    """Yield the first row that is not a list of integers, if there is one, and the value."""
    item_type = getattr(column.type, "value_type", None)
    if column.null_count:
        yield pc.index(column.is_null(), True).as_py(), None
    elif item_type is None or not any(is_type(item_type) for is_type in _INTEGERS):
        for row, value in enumerate(column.to_pylist()):
            if value != []:
                yield row, value[0] if isinstance(value, list) else value
    elif (items := pc.list_flatten(column)).null_count:
        yield pc.list_parent_indices(column)[pc.index(items.is_null(), True).as_py()].as_py(), None
