"""Converts token scores to group ids, and checks the scores and group ids that users provide."""

import math
from enum import IntEnum

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

from ..errors import InputError


class Group(IntEnum):
    """Groups of tokens by importance."""

    UNGROUPED = -1
    UNIMPORTANT = 0
    IMPORTANT = 1


class RankedGroup(IntEnum):
    """Like [`Group`], but before the tokens are ranked by their excess loss."""

    UNGROUPED = -1
    RANKED_AT_EACH_STEP = 0
    ALWAYS_IMPORTANT = 1


UNGROUPED, UNIMPORTANT, IMPORTANT = map(int, Group)

# Limits the number of metrics, and catches token ids passed as group ids by mistake
MAX_GROUPS = 32


def supervised_positions(labels: np.ndarray) -> np.ndarray:
    """Positions of the labels that are predicted: nothing predicts the first token."""
    return np.flatnonzero(labels[1:] != -100) + 1


def _grouped_positions(labels: np.ndarray, min_grouped_tokens: int) -> np.ndarray:
    """Positions of the supervised tokens; empty if the sample has too few of them to be grouped."""
    positions = supervised_positions(labels)
    return positions if len(positions) >= max(min_grouped_tokens, 2) else positions[:0]


def group_by_importance(
    labels: list[int],
    scores: list[float],
    important_fraction: float,
    min_grouped_tokens: int,
    first_token_ids: set[int],
) -> list[int]:
    """
    Return the group of each token of a sample: 1 (important), 0 (unimportant) or -1 (not supervised or not grouped).

    Of the `n` supervised tokens (labels other than -100), `round(important_fraction * n)` are important, at least 1
    and at most `n - 1`: those of `first_token_ids`, then those with the highest scores, with ties broken by position.
    Samples with fewer than `min_grouped_tokens` or 2 supervised tokens are not grouped.
    """
    labels = np.asarray(labels)
    groups = np.full(len(labels), UNGROUPED)
    positions = _grouped_positions(labels, min_grouped_tokens)
    if len(positions):
        num_important = min(max(round(important_fraction * len(positions)), 1), len(positions) - 1)
        ranks_last = ~np.isin(labels[positions], list(first_token_ids))
        # lexsort is stable and sorts by its last key first
        order = np.lexsort((-np.asarray(scores, dtype=np.float64)[positions], ranks_last))
        groups[positions] = UNIMPORTANT
        groups[positions[order[:num_important]]] = IMPORTANT
    return groups.tolist()


def add_group_ids(
    examples: dict[str, list],
    rows: list[int],
    important_fraction: float,
    min_grouped_tokens: int,
    first_token_ids: set[int],
) -> dict[str, list]:
    """For `Dataset.map`, batched: annotate rows by their `importance_scores` ([`group_by_importance`])."""
    group_ids = [
        group_by_importance(labels, scores, important_fraction, min_grouped_tokens, first_token_ids)
        for labels, scores in zip(examples["labels"], examples["importance_scores"], strict=True)
    ]
    return annotations(group_ids, rows)


def add_rankable_groups(
    examples: dict[str, list], rows: list[int], min_grouped_tokens: int, first_token_ids: set[int]
) -> dict[str, list]:
    """
    For `Dataset.map`, batched: annotate rows whose tokens are ranked during training ([`group_by_excess_loss`]): 1 for
    tokens that always rank first, 0 for other grouped tokens, -1 for tokens that are not grouped.
    """
    group_ids = []
    for labels in map(np.asarray, examples["labels"]):
        groups = np.full(len(labels), UNGROUPED)
        positions = _grouped_positions(labels, min_grouped_tokens)
        groups[positions] = np.where(np.isin(labels[positions], list(first_token_ids)), IMPORTANT, UNIMPORTANT)
        group_ids.append(groups.tolist())
    return annotations(group_ids, rows)


def annotations(group_ids: list[list[int]], rows: list[int]) -> dict[str, list]:
    """Return the annotation columns. The row number is repeated for each token so that it survives packing."""
    numbers = [[row] * len(groups) for row, groups in zip(rows, group_ids, strict=True)]
    return {"group_ids": group_ids, "example_number": numbers}


def has_groups(dataset: Dataset | IterableDataset) -> bool:
    """Whether any token is in a group; assumed to be true of a stream."""
    return isinstance(dataset, IterableDataset) or any(max(groups) > UNGROUPED for groups in dataset["group_ids"])


def add_token_scores(dataset: Dataset, scores: pa.ChunkedArray, name: str) -> Dataset:
    """Add a column with a score for each token; examples without scores, which have no labels, get zeros."""
    lengths = [len(ids) for ids in dataset["input_ids"]]
    values = [
        np.zeros(length, np.float32) if of_tokens is None else of_tokens
        for length, of_tokens in zip(lengths, scores.to_numpy(), strict=True)
    ]
    if name in dataset.column_names:  # only from this copy: the user's file does not change
        dataset = dataset.remove_columns(name)
    return dataset.add_column(name, values)


def require_column(examples: dict[str, list], column: str, dataset_name: str) -> None:
    if column not in examples:
        raise InputError(f"The {dataset_name} dataset has no column `{column}`; it has {sorted(examples)}.")


def copy_scores(examples: dict[str, list], rows: list[int], column: str, dataset_name: str) -> dict[str, list]:
    """
    For `Dataset.map`, batched: check that the user's scores are finite numbers, and copy them to `importance_scores`.
    """
    require_column(examples, column, dataset_name)
    for row, scores in zip(rows, examples[column], strict=True):
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                raise InputError(
                    f"Row {row} of the {dataset_name} dataset: column `{column}` has the score {score!r}. Scores must "
                    "be finite numbers, one for each token."
                )
    return {"importance_scores": examples[column]}


def copy_group_ids(examples: dict[str, list], rows: list[int], column: str, dataset_name: str) -> dict[str, list]:
    """
    For `Dataset.map`, batched: check that the user's group ids are integers from -1 to `MAX_GROUPS - 1`, and annotate
    the rows with them.
    """
    require_column(examples, column, dataset_name)
    for row, group_ids in zip(rows, examples[column], strict=True):
        for group_id in group_ids:
            is_integer = isinstance(group_id, int) and not isinstance(group_id, bool)
            if not is_integer or not UNGROUPED <= group_id < MAX_GROUPS:
                raise InputError(
                    f"Row {row} of the {dataset_name} dataset: column `{column}` has the group id {group_id!r}. Group "
                    f"ids must be integers from 0 to {MAX_GROUPS - 1}, or -1 for a token without a group."
                )
    return annotations(examples[column], rows)
