"""Reference log-probabilities, from a list for each example to columns with a value for each token."""

import itertools
import math
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from ..base.preparation import map_description
from ..base.prepared_sets import MADE_WITH
from ..base.trl_internals import get_dataset_column_names
from ..errors import InputError
from .config import PoFTConfig


logger = get_logger(__name__)

COLUMN = "reference_log_prob_{}"


def reference_names(models: list[str]) -> list[str]:
    """Names of the models in metrics: the last part of their ids or paths, or their numbers if that is ambiguous."""
    names = [model.rstrip("/").rpartition("/")[2] for model in models]
    unique = len({*names, "mean"}) == len(names) + 1
    return names if unique else [str(number) for number in range(len(names))]


def number_in_data(dataset: Dataset | IterableDataset, args: PoFTConfig, dataset_name: str) -> int:
    """Number of reference models whose scores a data set has, by its columns or its first row; 0 without scores."""
    columns, models = get_dataset_column_names(dataset), args.reference_models
    prepared = itertools.takewhile(columns.__contains__, map(COLUMN.format, itertools.count()))
    number = len(list(prepared)) if "input_ids" in columns else 0
    is_raw = not number and MADE_WITH not in columns  # a trainer's set is compared by its settings
    if is_raw and (args.dataset_kwargs or {}).get("skip_prepare_dataset", False):
        raise InputError(
            f"With `skip_prepare_dataset=True` the {dataset_name} dataset must bring the columns "
            f"`{COLUMN.format(0)}`, ... with each reference model's mean log-probability on every token, and "
            "`scored_mask`."
        )
    if not number and args.reference_score_column in columns:
        if args.length_normalizer == "target":
            raise InputError(
                "`length_normalizer='target'` needs summed log-probabilities, but the column "
                f"`{args.reference_score_column}` of the {dataset_name} dataset has means. Set "
                "`length_normalizer='own'`, or use `reference_score_file`."
            )
        first = next(iter(dataset))[args.reference_score_column]
        number = len(first) if isinstance(first, list) and first else 1
    if number and models and len(models) != number:
        raise InputError(
            f"The {dataset_name} dataset has the scores of {number} reference models, but `reference_models={models}` "
            f"names {len(models)}. Name those, or none."
        )
    return number


def spread_over_tokens(
    example: dict[str, Any], column: str, num_references: int, dataset_name: str
) -> dict[str, np.ndarray]:
    """Make a column for each reference model, with the example's value on every token. For `Dataset.map`."""
    values = example[column]
    is_list = isinstance(values, list | tuple) and all(map(is_log_prob, values))
    if not is_list or len(values) != num_references:
        raise InputError(
            f"Row {example['example_row']} of the {dataset_name} dataset: column `{column}` has {values!r}. Give a "
            f"list of {num_references} finite numbers, one mean log-probability (0 or less) for each reference model."
        )
    num_tokens = len(example["input_ids"])
    return {COLUMN.format(j): np.full(num_tokens, value, dtype=np.float32) for j, value in enumerate(values)}


def is_log_prob(value: Any) -> bool:
    """Whether a value is a finite number of at most 0, up to rounding."""
    return isinstance(value, int | float) and math.isfinite(value) and value < 1e-3


def drop_unscored(
    dataset: Dataset | IterableDataset, args: PoFTConfig, dataset_name: str
) -> Dataset | IterableDataset:
    """
    Drop examples without a scored token and, if they are compared with scores of whole responses, truncated ones.
    Raises an `InputError` if none is left.
    """
    map_kwargs = map_description(dataset, args, f"Dropping unscored examples from {dataset_name} dataset")
    kept = dataset.filter(_is_scored, fn_kwargs={"needs_whole": args.needs_references}, **map_kwargs)
    if isinstance(dataset, IterableDataset) or len(kept) == len(dataset):
        return kept
    num_dropped, num_silent = len(dataset) - len(kept), dataset["num_scored_tokens"][:].count(0)
    reasons = (
        f"{num_silent} without a word of the assistant, {num_dropped - num_silent} with scored tokens that "
        f"max_length={args.max_length} cuts"
    )
    if len(kept) == 0:
        fix = "Raise `max_length`." if num_silent < len(dataset) else _where_words_are(dataset[0])
        raise InputError(f"No example of the {dataset_name} dataset can be used: {reasons}. {fix}")
    logger.warning(f"Dropped {num_dropped} of {len(dataset)} examples of the {dataset_name} dataset: {reasons}.")
    return kept


def _where_words_are(example: dict[str, Any]) -> str:
    turns = example.get("completion") or example.get("messages")
    if not isinstance(turns, list):
        return "Give labels, or messages."
    roles = sorted({str(turn.get("role")) for turn in turns})
    return f"Scored are turns of the role 'assistant' whose content is a text; row 0 has the roles {roles}."


def _is_scored(example: dict[str, Any], needs_whole: bool) -> bool:
    num_left = sum(example["scored_mask"][1:])
    return num_left == example["num_scored_tokens"] > 0 if needs_whole else num_left > 0
