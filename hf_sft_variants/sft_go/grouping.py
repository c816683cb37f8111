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
    examples: dict[str, list], important_fraction: float, min_grouped_tokens: int, first_token_ids: set[int]
) -> dict[str, list[list[int]]]:
    """For `Dataset.map`, batched: adds `group_ids` from `labels` and `importance_scores` ([`group_by_importance`])."""
    return {
        "group_ids": [
            group_by_importance(labels, scores, important_fraction, min_grouped_tokens, first_token_ids)
            for labels, scores in zip(examples["labels"], examples["importance_scores"], strict=True)
        ]
    }


def add_rankable_groups(
    examples: dict[str, list], min_grouped_tokens: int, first_token_ids: set[int]
) -> dict[str, list[list[int]]]:
    """
    For `Dataset.map`, batched: adds `group_ids` to be ranked in training ([`group_by_excess_loss`]): 1 for tokens that
    rank first, 0 for the other supervised ones, -1 for those that are not supervised or not grouped.
    """
    rows = []
    for labels in map(np.asarray, examples["labels"]):
        groups = np.full(len(labels), UNGROUPED)
        positions = supervised_positions(labels)
        if len(positions) >= max(min_grouped_tokens, 2):
            groups[positions] = np.where(np.isin(labels[positions], list(first_token_ids)), IMPORTANT, UNIMPORTANT)
        rows.append(groups.tolist())
    return {"group_ids": rows}


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
    For `Dataset.map`: check a row of the user's own group ids and copy it to `group_ids`.

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
    return {"group_ids": example[column]}
