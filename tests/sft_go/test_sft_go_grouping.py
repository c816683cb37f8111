import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft_variants.sft_go.grouping import (
    MAX_GROUPS,
    copy_group_ids,
    copy_scores,
    group_by_importance,
)
from hf_sft_variants.text.special_tokens import special_token_ids


@given(
    rows=st.lists(st.tuples(st.integers(5, 9), st.booleans(), st.integers(0, 3)), min_size=1, max_size=40),
    fraction=st.floats(0.01, 0.99),
    first_token_ids=st.sets(st.integers(5, 9), max_size=2),
)
@settings(max_examples=300, deadline=None)
def test_exactly_the_asked_share_is_important(rows, fraction, first_token_ids):
    labels = [token_id if supervised else -100 for token_id, supervised, _ in rows]
    scores = [float(score) for *_, score in rows]
    groups = group_by_importance(labels, scores, fraction, 0, first_token_ids)

    supervised = [t for t in range(1, len(labels)) if labels[t] != -100]
    if len(supervised) < 2:
        assert groups == [-1] * len(labels)
        return
    num_important = min(max(round(fraction * len(supervised)), 1), len(supervised) - 1)
    ranked = sorted(supervised, key=lambda t: (labels[t] not in first_token_ids, -scores[t], t))
    expected = [-1] * len(labels)
    for rank, t in enumerate(ranked):
        expected[t] = 1 if rank < num_important else 0
    assert groups == expected


def test_many_equal_scores_do_not_swallow_everything():
    groups = group_by_importance([1, *[7] * 10], [0.0] * 11, 0.3, 0, set())
    assert groups == [-1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_the_first_token_is_predicted_by_nothing():
    assert group_by_importance([7, 8, 9], [9.0, 0.0, 1.0], 0.5, 0, set()) == [-1, 0, 1]


def test_short_samples_are_not_grouped():
    labels = [-100, 4, 5, 6]
    assert group_by_importance(labels, [0, 3, 2, 1], 0.5, 4, set()) == [-1] * 4
    assert group_by_importance(labels, [0, 3, 2, 1], 0.5, 3, set()) == [-1, 1, 1, 0]


def test_special_tokens_come_first_and_still_count():
    labels = [1, 4, 5, 6, 2]
    assert group_by_importance(labels, [0, 9, 8, 7, 0], 0.5, 0, {2}) == [-1, 1, 0, 0, 1]
    assert group_by_importance(labels, [0, 9, 8, 7, 0], 0.5, 0, set()) == [-1, 1, 1, 0, 0]


def test_special_tokens_are_those_of_the_vocabulary(tokenizer):
    assert special_token_ids(tokenizer) == {0, 1, 2}


@pytest.mark.parametrize("value", [0.0, 1.0, True, "1", None, -2, MAX_GROUPS])
def test_group_ids_must_be_small_integers(value):
    with pytest.raises(ValueError, match=r"Row 3 of the train dataset: column `mine` has the group id "):
        copy_group_ids({"mine": [[1], [0, value]]}, [2, 3], "mine", "train")


def test_group_ids_pass():
    annotated = copy_group_ids({"mine": [[-1, 0, 5], [2]]}, [7, 8], "mine", "train")
    assert annotated == {"group_ids": [[-1, 0, 5], [2]], "example_number": [[7, 7, 7], [8]]}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "0.5", True])
def test_scores_must_be_finite_numbers(value):
    with pytest.raises(ValueError, match=r"Row 7 of the eval dataset: column `mine` has the score "):
        copy_scores({"mine": [[1], [0.5, value]]}, [6, 7], "mine", "eval")


def test_numpy_rows_group_alike():
    labels, scores = [-100, 4, 5, 6, 7], [0.0, 1.0, 4.0, 3.0, 2.0]
    assert group_by_importance(np.array(labels), np.array(scores), 0.5, 0, set()) == [-1, 0, 1, 1, 0]
