"""Means over seeds, and differences from the baseline with intervals that hold for few seeds."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats


LEVEL = 0.95
MIN_SEEDS = 3
BETTER, WORSE, DIFFERENT = "better", "worse", "different"
NOT_SHOWN, TOO_FEW_SEEDS = "no difference shown", f"no verdict below {MIN_SEEDS} seeds"


def summarize(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Mean over seeds of a metric ([`~hf_sft_variants.comparison.evaluations.metric`]), and its standard deviation as
    `spread`, which is `None` for one seed.
    """
    means = [metric["mean"] for metric in metrics]
    return {"mean": statistics.fmean(means), "spread": statistics.stdev(means) if len(means) > 1 else None}


def compare(arm: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Difference of an arm from the baseline, paired by seed, with a 95 % interval over new seeds and new test rows. Both
    have one metric per seed, of the same seeds and rows. Returns `difference`, `low`, `high` (both `None` for one
    seed), `per_seed` and `verdict`.
    """
    per_seed = [ours["mean"] - theirs["mean"] for ours, theirs in zip(arm, baseline, strict=True)]
    difference = statistics.fmean(per_seed)
    low = high = None
    if len(per_seed) > 1:
        half = float(half_width(_paired_differences(arm, baseline)))
        low, high = difference - half, difference + half
    return {
        "difference": difference,
        "low": low,
        "high": high,
        "per_seed": per_seed,
        "verdict": _verdict(len(per_seed), low, high, arm[0]["higher_is_better"]),
    }


def half_width(differences: np.ndarray) -> np.ndarray:
    """
    Half the width of the 95 % interval of a mean over seeds and test rows that are both drawn at random, from paired
    differences of shape `(..., seeds, rows)` with at least two seeds. With one row, only the seeds count.

    The squares of two half-widths are added (Howe, 1974): Student's over the means of the seeds, and Student's over
    the means of the rows without the noise of single cells, which the seeds' means already contain. The sum is never
    less than the rows' own half-width, however alike the seeds happen to be.
    """
    seeds, rows = differences.shape[-2:]
    of_seeds, of_rows = differences.mean(-1, keepdims=True), differences.mean(-2, keepdims=True)
    from_seeds = _quantile(seeds - 1) ** 2 * of_seeds.var((-2, -1), ddof=1) / seeds
    if rows == 1:
        return np.sqrt(from_seeds)
    noise = differences - of_seeds - of_rows + differences.mean((-2, -1), keepdims=True)
    noise_variance = (noise**2).sum((-2, -1)) / ((seeds - 1) * (rows - 1))
    from_rows = _quantile(rows - 1) ** 2 * of_rows.var((-2, -1), ddof=1) / rows
    from_noise = _quantile(rows - 1) ** 2 * noise_variance / (seeds * rows)
    return np.sqrt(np.maximum(from_seeds + np.maximum(from_rows - from_noise, 0), from_rows))


def _quantile(degrees_of_freedom: int) -> float:
    return stats.t.ppf((1 + LEVEL) / 2, degrees_of_freedom)


def _paired_differences(arm: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> np.ndarray:
    """Differences by seed and test row; one column with the means if the rows of a metric are unknown."""
    if any(metric["rows"] is None for metric in (*arm, *baseline)):
        return np.array([[ours["mean"] - theirs["mean"]] for ours, theirs in zip(arm, baseline, strict=True)])
    return np.array([_linearized(ours) - _linearized(theirs) for ours, theirs in zip(arm, baseline, strict=True)])


def _linearized(metric: dict[str, Any]) -> np.ndarray:
    """Row values whose plain mean is the metric and varies as it does: the delta method for a ratio of sums."""
    rows, counts = np.array(metric["rows"], dtype=float), metric["counts"]
    if counts is None:
        return rows
    return metric["mean"] + (rows - metric["mean"] * np.array(counts)) / np.mean(counts)


def _verdict(num_seeds: int, low: float | None, high: float | None, higher_is_better: bool | None) -> str:
    if num_seeds < MIN_SEEDS:
        return TOO_FEW_SEEDS
    if low <= 0 <= high:
        return NOT_SHOWN
    if higher_is_better is None:
        return DIFFERENT
    return BETTER if (low > 0) == higher_is_better else WORSE
