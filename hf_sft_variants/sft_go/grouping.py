"""From a score for each token to group ids, and the checks on group ids that users bring themselves."""

import math
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase


UNGROUPED, UNIMPORTANT, IMPORTANT = -1, 0, 1

# Keeps the logged metrics few, and tells token ids given by mistake from group ids
MAX_GROUPS = 32


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all tokens the tokenizer calls special: eos, end of turn, role markers, those added later included."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def supervised_positions(labels: np.ndarray) -> np.ndarray:
    """Positions of the labels that are predicted: the first token is predicted by nothing."""
    return np.flatnonzero(labels[1:] != -100) + 1


def group_by_importance(
    labels: list[int],
    scores: list[float],
    important_fraction: float,
    min_grouped_tokens: int,
    first_token_ids: set[int],
) -> list[int]:
    """
    Split a sample's supervised tokens into important and unimportant ones.

    Args:
        labels (`list[int]`):
            Token id where the token is in the loss, `-100` elsewhere.
        scores (`list[float]`):
            Importance of each token, the same length.
        important_fraction (`float`):
            Share η of the `n` supervised tokens that is important: `round(η·n)` of them, at least 1 and at most
            `n - 1`; of equal scores the earlier position is the more important one.
        min_grouped_tokens (`int`):
            With fewer supervised tokens (or fewer than 2) no token is grouped.
        first_token_ids (`set[int]`):
            Token ids that rank before all others, whatever their score.

    Returns:
        `list[int]`: Group of each token: 1 important, 0 unimportant, -1 not supervised or not grouped.
    """
    labels = np.asarray(labels)
    groups = np.full(len(labels), UNGROUPED)
    positions = supervised_positions(labels)
    num_tokens = len(positions)
    if num_tokens < max(min_grouped_tokens, 2):
        return groups.tolist()
    num_important = min(max(round(important_fraction * num_tokens), 1), num_tokens - 1)
    ranks_first = np.isin(labels[positions], list(first_token_ids))
    # lexsort is stable and sorts by its last key first
    order = np.lexsort((-np.asarray(scores, dtype=np.float64)[positions], ~ranks_first))
    groups[positions] = UNIMPORTANT
    groups[positions[order[:num_important]]] = IMPORTANT
    return groups.tolist()


def add_group_ids(
    example: dict[str, Any], row: int, important_fraction: float, min_grouped_tokens: int, first_token_ids: set[int]
) -> dict[str, list[int]]:
    """For `Dataset.map`: annotates a row by its `importance_scores` ([`group_by_importance`])."""
    labels, scores = example["labels"], example["importance_scores"]
    group_ids = group_by_importance(labels, scores, important_fraction, min_grouped_tokens, first_token_ids)
    return annotations(group_ids, row)


def add_rankable_groups(
    example: dict[str, Any], row: int, min_grouped_tokens: int, first_token_ids: set[int]
) -> dict[str, list[int]]:
    """
    For `Dataset.map`: annotates a row whose tokens are ranked in training ([`group_by_excess_loss`]): 1 for tokens
    that rank first, 0 for the other supervised ones, -1 for those that are not supervised or not grouped.
    """
    labels = np.asarray(example["labels"])
    groups = np.full(len(labels), UNGROUPED)
    positions = supervised_positions(labels)
    if len(positions) >= max(min_grouped_tokens, 2):
        groups[positions] = np.where(np.isin(labels[positions], list(first_token_ids)), IMPORTANT, UNIMPORTANT)
    return annotations(groups.tolist(), row)


def annotations(group_ids: list[int], row: int) -> dict[str, list[int]]:
    """The annotation columns of a row; its number stands on each token, so that it survives packing."""
    return {"group_ids": group_ids, "example_number": [row] * len(group_ids)}


def copy_scores(example: dict[str, Any], row: int, column: str, dataset_name: str) -> dict[str, list[float]]:
    """
    For `Dataset.map`: check a row of the user's own scores and copy it to `importance_scores`.

    Raises:
        `ValueError`: If a score is no finite number, naming row, column and value.
    """
    for score in example[column]:
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(
                f"Row {row} of the {dataset_name} dataset: column `{column}` has {score!r} as a score. Give a finite "
                "number for each token."
            )
    return {"importance_scores": example[column]}


def copy_group_ids(example: dict[str, Any], row: int, column: str, dataset_name: str) -> dict[str, list[int]]:
    """
    For `Dataset.map`: check a row of the user's own group ids and annotate it with them.

    Raises:
        `ValueError`: If an id is no integer from -1 to `MAX_GROUPS - 1`, naming row, column and value.
    """
    for group_id in example[column]:
        is_integer = isinstance(group_id, int) and not isinstance(group_id, bool)
        if not is_integer or not UNGROUPED <= group_id < MAX_GROUPS:
            raise ValueError(
                f"Row {row} of the {dataset_name} dataset: column `{column}` has {group_id!r} as a group id. Give an "
                f"integer from 0 to {MAX_GROUPS - 1} for each token, or -1 for a token in no group."
            )
    return annotations(example[column], row)
