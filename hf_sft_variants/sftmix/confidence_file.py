"""Confidence of examples as a table: keys, perplexities at checkpoints, ranks, halves; written, read and joined."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from accelerate.logging import get_logger
from datasets import Dataset

from ..base.example_keys import EXAMPLE_KEY, add_content_keys
from ..errors import InputError
from .pairing import CONFIDENT, NEITHER, UNCONFIDENT, halves_of_order


logger = get_logger(__name__)

# To be raised when the same run would give other values
FORMAT_VERSION = 2

# exp of more overflows float32 soon; such an example is among the least confident ones anyway
MAX_NLL = 20.0

_METADATA_KEY = b"hf_sft_variants"
_HALF_NAMES = {CONFIDENT: "confident", UNCONFIDENT: "unconfident", NEITHER: None}


def require_unique_keys(dataset: Dataset) -> None:
    """
    Check the keys of a data set that has brought its own.

    Raises:
        `InputError`: If two examples have the same key.
    """
    if len(set(dataset[EXAMPLE_KEY])) < len(dataset):
        raise InputError(f"Column `{EXAMPLE_KEY}` names two examples the same. Give each a key of its own.")


def perplexity(nll: np.ndarray) -> np.ndarray:
    """exp of a mean negative log-likelihood in nats, which is cut off at `MAX_NLL` first."""
    return np.exp(np.minimum(nll, MAX_NLL))


def order_by_confidence(mean_perplexity: np.ndarray, mean_nll: np.ndarray, measure: str) -> np.ndarray:
    """
    Numbers of the examples, the most confident one first. Ties go by mean NLL, then by number; an example without a
    value (NaN) is left out.
    """
    by = (mean_nll, mean_perplexity) if measure == "perplexity" else (mean_nll,)
    order = np.lexsort(by)  # the last one counts first; stable
    return order[~np.isnan(mean_nll[order])]


def confidence_table(
    keys: list[str], num_labels: np.ndarray, nll: dict[int, np.ndarray], measure: str, keys_of: str
) -> pa.Table:
    """
    Rank examples by what checkpoints say of them.

    Args:
        keys (`list[str]`):
            Their keys.
        num_labels (`np.ndarray`):
            Number of labels of each.
        nll (`dict[int, np.ndarray]`):
            Step of each checkpoint to the mean NLL of each example's labels, in nats; NaN without a label.
        measure (`str`):
            `"perplexity"` or `"mean_nll"`.
        keys_of (`str`):
            What the keys are made of.

    Returns:
        `pa.Table`: The columns that [`ConfidenceTrackingCallback`] documents.
    """
    columns = {EXAMPLE_KEY: keys, "num_labels": num_labels}
    for step, values in nll.items():
        columns[f"nll_{step}"] = values
        columns[f"perplexity_{step}"] = perplexity(values)
    columns["mean_nll"] = np.mean(list(nll.values()), axis=0)
    columns["mean_perplexity"] = np.mean([perplexity(values) for values in nll.values()], axis=0)
    order = order_by_confidence(columns["mean_perplexity"], columns["mean_nll"], measure)
    ranks = np.full(len(keys), -1)
    ranks[order] = np.arange(len(order))
    columns["rank"] = pa.array(ranks, mask=ranks < 0)
    halves = halves_of_order(order, len(keys)).tolist()
    columns["half"] = pa.array([_HALF_NAMES[half] for half in halves], pa.string())
    table = pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
    description = {"version": FORMAT_VERSION, "measure": measure, "steps": list(nll), "keys": keys_of}
    return table.replace_schema_metadata({_METADATA_KEY: json.dumps(description)})


def halves_from_file(
    path: str | Path,
    examples: Dataset,
    measure: str,
    skip_missing: bool = False,
    text_field: str = "text",
    eos_token: str | None = None,
) -> torch.Tensor:
    """
    Split the examples of a data set by a confidence file, which may stand in another order and have more examples.

    Args:
        path (`str` or `Path`):
            What [`ConfidenceTrackingCallback`] wrote. Needed are the columns `example_key`, `mean_nll` and
            `mean_perplexity`.
        examples ([`~datasets.Dataset`]):
            Prepared examples with `example_key`, `input_ids`, `labels` and `num_labels`.
        measure (`str`):
            `"perplexity"` or `"mean_nll"`.
        skip_missing (`bool`, *optional*, defaults to `False`):
            Whether an example that is not in the file is in neither half, rather than an error.
        text_field (`str`, *optional*, defaults to `"text"`):
            Column of a plain text.
        eos_token (`str`, *optional*):
            The tokenizer's end of sequence, which `SFTTrainer` has appended to plain texts.

    Returns:
        `torch.Tensor` of shape `(len(examples),)`: The half of each example.

    Raises:
        `InputError`: If the file can't be read or has no such columns, lacks an example, or has no number for it.
    """
    table, keys_of = _read(path)
    if keys_of == "column":
        keys = examples[EXAMPLE_KEY]
    else:
        content = examples.select_columns(["input_ids", "labels"]) if keys_of == "tokens" else examples
        keys = add_content_keys(content, None, text_field, eos_token, is_prepared=True)[EXAMPLE_KEY]
    values = np.full((2, len(examples)), np.nan)
    row_of_key = {key: row for row, key in enumerate(table[EXAMPLE_KEY].to_pylist())}
    has_labels = np.array(examples["num_labels"]) > 0
    rows = np.array([row_of_key.get(key, -1) for key in keys])
    missing = np.flatnonzero((rows < 0) & has_labels)
    if len(missing) and (not skip_missing or len(missing) == has_labels.sum()):
        _refuse_missing(path, missing[0], keys[int(missing[0])], len(missing), has_labels.sum())
    if len(missing):
        logger.warning(f"{len(missing)} of {len(examples)} examples are not in {path}; they have no partner.")
    found = np.flatnonzero((rows >= 0) & has_labels)
    for part, name in zip(values, ("mean_perplexity", "mean_nll"), strict=True):
        part[found] = table[name].to_numpy()[rows[found]]
    without_number = found[np.isnan(values[:, found]).any(0)]
    if len(without_number):
        raise InputError(
            f"Row {without_number[0]} of the train dataset (key {keys[int(without_number[0])]}) has no perplexity in "
            f"{path}: it is NaN or null there. Write the file again, or remove the row."
        )
    return split_in_halves(*values, measure)


def _read(path: str | Path) -> tuple[pa.Table, str]:
    where, fix = f"`confidence_file={str(path)!r}`", "Give a file that `ConfidenceTrackingCallback` wrote."
    if not Path(path).is_file():
        raise InputError(f"{where} can't be read: there is no such file. {fix}")
    try:
        table = pq.read_table(path)
        description = dict(json.loads((table.schema.metadata or {}).get(_METADATA_KEY, "{}")))
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        raise InputError(f"{where} can't be read: {error} {fix}") from error
    for name, (wanted, is_wanted) in _COLUMNS.items():
        if name not in table.column_names:
            raise InputError(f"{where} has no column `{name}`, only {table.column_names}. {fix}")
        found = table.schema.field(name).type
        if not is_wanted(found):
            raise InputError(f"{where} has no {wanted} in the column `{name}`, but {found}. {fix}")
    if description.get("version", FORMAT_VERSION) != FORMAT_VERSION:
        raise InputError(
            f"{where} has the format {description['version']!r}, but this version of hf_sft_variants reads "
            f"{FORMAT_VERSION}. Write the file again."
        )
    _require_equal_repeats(table, where)
    negative = pc.index(pc.less(table["mean_nll"], -1e-3), True).as_py()
    if negative >= 0:
        raise InputError(
            f"{where} has the `mean_nll` {table['mean_nll'][negative]} in row {negative}, but it is never negative: a "
            f"log-probability has the other sign. {fix}"
        )
    return table, description.get("keys", "column")


def _require_equal_repeats(table: pa.Table, where: str) -> None:
    """Examples of equal content share a key; their values may differ by rounding, as those of two batches do."""
    columns = (table[name].to_pylist() for name in _COLUMNS)
    first = {}
    for key, *values in zip(*columns, strict=True):
        expected = first.setdefault(key, values)
        is_same = expected is values or np.allclose(
            np.array(values, float), np.array(expected, float), rtol=1e-4, equal_nan=True
        )
        if not is_same:
            raise InputError(
                f"{where} has two different confidences of the example with the key {key}: {expected} and {values} "
                "(`mean_nll`, `mean_perplexity`). Remove one of the rows."
            )


def _are_numbers(values: pa.DataType) -> bool:
    return pa.types.is_floating(values) or pa.types.is_integer(values)


def _are_texts(values: pa.DataType) -> bool:
    return pa.types.is_string(values) or pa.types.is_large_string(values)


# Those that are read, of those that `ConfidenceTrackingCallback` writes
_COLUMNS = {
    EXAMPLE_KEY: ("texts", _are_texts),
    "mean_nll": ("numbers", _are_numbers),
    "mean_perplexity": ("numbers", _are_numbers),
}


def _refuse_missing(path, row: int, key: str, num_missing: int, num_examples: int):
    if num_missing == num_examples:
        raise InputError(
            f"The confidence in {path} is that of another data set: none of the {num_examples} examples of the train "
            f"dataset is in it (the first has the key {key}). Give the file of this data set."
        )
    raise InputError(
        f"Row {row} of the train dataset (key {key}) is not in {path}, and {num_missing} of {num_examples} are not. "
        "Give the file of this data set, or remove the rows."
    )


def split_in_halves(mean_perplexity: np.ndarray, mean_nll: np.ndarray, measure: str) -> torch.Tensor:
    """
    Split examples at the median of their confidence, by rank.

    Returns:
        `torch.Tensor` of shape `(num_examples,)`: `CONFIDENT`, `UNCONFIDENT` or `NEITHER`.

    Raises:
        `InputError`: If fewer than two examples have a confidence.
    """
    order = order_by_confidence(mean_perplexity, mean_nll, measure)
    if len(order) < 2:
        raise InputError(f"{len(order)} example of the train dataset has labels, but a pair takes two. Add examples.")
    return halves_of_order(order, len(mean_nll))
