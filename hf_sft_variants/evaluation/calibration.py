"""Calibration of the tokens of held-out completions."""

import numpy as np

from .held_out import ScoredRow


NUM_BINS = 15


def expected_calibration_error(rows: list[ScoredRow]) -> float:
    """
    Compute how far the probabilities of the most likely tokens are from the share of them that are right, in
    [bins](https://huggingface.co/papers/1706.04599) of equal width, averaged over the tokens of all completions. The
    rows must have been scored with `top`.
    """
    log_probs, top_log_probs = (np.concatenate(columns) for columns in zip(*map(_columns, rows), strict=True))
    confidence, is_right = np.exp(top_log_probs.astype(float)), log_probs == top_log_probs
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=confidence - is_right, minlength=NUM_BINS)  # each bin's, times its tokens
    return float(np.abs(gaps).sum() / len(confidence))


def _columns(row: ScoredRow) -> tuple[np.ndarray, np.ndarray]:
    if row.top_log_probs is None:
        raise ValueError("The rows must have been scored with `top`.")
    start = len(row.input_ids) - row.num_tokens
    return row.log_probs[start:], row.top_log_probs[start:]
