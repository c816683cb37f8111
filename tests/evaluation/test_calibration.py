"""Expected calibration error of tokens."""

import numpy as np
import pytest

from hf_sft_variants.evaluation.calibration import expected_calibration_error
from hf_sft_variants.evaluation.held_out import ScoredRow


def scored(*tokens):
    """A row with a prompt of two tokens, then for each token the top probability and whether it is the right one."""
    top = np.array([0, 0, *(np.log(p) for p, _ in tokens)], dtype=np.float32)
    log_probs = np.array([0, 0, *(np.log(p if is_right else (1 - p) / 2) for p, is_right in tokens)], dtype=np.float32)
    return ScoredRow([], [], [1] * len(top), log_probs, top, 0.0, len(tokens))


def test_bins_by_hand():
    """Of two tokens with 0.8, one is right: 0.3 too much. The one with 0.5 is wrong: 0.5. The sure one is right: 0."""
    rows = [scored((0.8, True), (0.5, False)), scored(), scored((0.8, False), (1.0, True))]
    assert expected_calibration_error(rows) == pytest.approx((2 * 0.3 + 0.5 + 0) / 4)


def test_errors_in_different_bins_do_not_cancel():
    rows = [scored((0.9, False), (0.1, True))]
    assert expected_calibration_error(rows) == pytest.approx(0.9)
