"""The confidence of examples as a table: ranked, written, read and joined to the examples by key."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from datasets import Dataset

from ..base.example_keys import EXAMPLE_KEY, add_content_keys
from ..errors import InputError
from ..scoring.joins import find_conflict, rows_of_keys
from ..scoring.user_tables import read_user_table
from .pairing import CONFIDENT, NEITHER, UNCONFIDENT, halves_of_order, order_by_confidence, split_in_halves


logger = get_logger(__name__)

# Increase it when the same run would give other values
FORMAT_VERSION = 2

# exp of a larger NLL soon overflows float32; such an example is among the least confident ones anyway
MAX_NLL = 20.0

_METADATA_KEY = b"hf_sft_variants"
_HALF_NAMES = {CONFIDENT: "confident", UNCONFIDENT: "unconfident", NEITHER: None}

# The columns that are read
_SCHEMA = pa.schema({EXAMPLE_KEY: pa.string(), "mean_nll": pa.float64(), "mean_perplexity": pa.float64()})


def require_unique_keys(dataset: Dataset) -> None:
    """Refuse a column `example_key` of the user in which two examples have the same key."""
    if len(set(dataset[EXAMPLE_KEY])) < len(dataset):
        raise InputError(f"Column `{EXAMPLE_KEY}` names two examples the same. Give each a key of its own.")


def perplexity(nll: np.ndarray) -> np.ndarray:
    """exp of a mean negative log-likelihood in nats, which is clamped to `MAX_NLL`."""
    return np.exp(np.minimum(nll, MAX_NLL))


def confidence_table(
    keys: list[str], num_labels: np.ndarray, nll: dict[int, np.ndarray], measure: str, keys_of: str
) -> pa.Table:
    """
    Rank examples by their NLL at checkpoints, in a table with the columns documented in
    [`ConfidenceTrackingCallback`]. `nll` maps each checkpoint's step to the mean NLL of each example's labels in nats,
    NaN without labels. `keys_of` is the source of the keys: `"text"`, `"tokens"` or `"column"`.
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
    Split prepared examples by a confidence file, which may be in another order and have more examples. With
    `skip_missing`, examples that are not in the file belong to neither half; otherwise they are refused. The halves
    are as in [`~hf_sft_variants.sftmix.pairing.halves_of_order`].
    """
    table, keys_of = _read(path)
    if keys_of != "column":
        content = examples.select_columns(["input_ids", "labels"]) if keys_of == "tokens" else examples
        keys = add_content_keys(content, None, text_field, eos_token, is_prepared=True)[EXAMPLE_KEY][:]
    else:
        keys = examples[EXAMPLE_KEY][:]
    has_labels = np.array(examples["num_labels"]) > 0
    rows = rows_of_keys(keys, table)
    is_found = rows.is_valid().to_numpy(zero_copy_only=False)
    missing, num_examples = np.flatnonzero(has_labels & ~is_found), has_labels.sum()
    if len(missing) == num_examples:
        raise InputError(
            f"The confidence in {path} is that of another data set: none of the {num_examples} examples of the train "
            f"dataset is in it (the first has the key {keys[missing[0]]}). Give the file of this data set."
        )
    if len(missing) and not skip_missing:
        raise InputError(
            f"Row {missing[0]} of the train dataset (key {keys[missing[0]]}) is not in {path}, and {len(missing)} of "
            f"{num_examples} are not. Give the file of this data set, or remove the rows."
        )
    if len(missing):
        logger.warning(f"{len(missing)} of {len(keys)} examples are not in {path}; they have no partner.")
    found = table.take(rows)
    mean_perplexity, mean_nll = (
        np.where(has_labels, found[name].to_numpy(), np.nan) for name in ("mean_perplexity", "mean_nll")
    )
    without_value = np.flatnonzero(has_labels & is_found & np.isnan(mean_perplexity + mean_nll))
    if len(without_value):
        raise InputError(
            f"Row {without_value[0]} of the train dataset (key {keys[without_value[0]]}) has no perplexity in {path}: "
            "it is NaN or null there. Write the file again, or remove the row."
        )
    return split_in_halves(mean_perplexity, mean_nll, measure)


def _read(path: str | Path) -> tuple[pa.Table, str]:
    """The columns of a confidence file, and what its keys are made of."""
    where, fix = f"`confidence_file={str(path)!r}`", "Give a file that `ConfidenceTrackingCallback` wrote."
    table = read_user_table(path, where, _SCHEMA, _SCHEMA.names, fix)
    try:
        description = dict(json.loads((table.schema.metadata or {}).get(_METADATA_KEY, "{}")))
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} can't be read: {error} {fix}") from error
    if description.get("version", FORMAT_VERSION) != FORMAT_VERSION:
        raise InputError(
            f"{where} has the format {description['version']!r}, but this version of hf_sft_variants reads "
            f"{FORMAT_VERSION}. Write the file again."
        )
    conflict = find_conflict(table, ["mean_nll", "mean_perplexity"])
    if conflict is not None:
        first, other = ([row["mean_nll"], row["mean_perplexity"]] for row in conflict)
        raise InputError(
            f"{where} has two different confidences of the example with the key {conflict[0][EXAMPLE_KEY]}: {first} "
            f"and {other} (`mean_nll`, `mean_perplexity`). Remove one of the rows."
        )
    negative = pc.index(pc.less(table["mean_nll"], -1e-3), True).as_py()
    if negative >= 0:
        raise InputError(
            f"{where} has the `mean_nll` {table['mean_nll'][negative]} in row {negative}, but it is never negative: a "
            f"log-probability has the other sign. {fix}"
        )
    return table, description.get("keys", "column")
