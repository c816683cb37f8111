"""Means over seeds, and differences from the baseline with bootstrap intervals."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats


DRAWS, BLOCK = 2000, 100
LEVEL = 0.95
BETTER, WORSE, DIFFERENT = "better", "worse", "different"
NOT_SHOWN, UNKNOWN = "no difference shown", "no interval"


def summarize(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Mean of a metric over seeds, and its standard deviation.

    Args:
        metrics (`Sequence[dict[str, Any]]`):
            The metric of each seed's run, as [`~hf_sft_variants.comparison.evaluations.metric`] has it.

    Returns:
        `dict[str, Any]`: `mean`, and `spread`, which is `None` for one seed.
    """
    means = [metric["mean"] for metric in metrics]
    return {"mean": statistics.fmean(means), "spread": statistics.stdev(means) if len(means) > 1 else None}


def compare(arm: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Difference of an arm from the baseline, seed by seed, with a 95 % interval of the paired bootstrap.

    Seeds are drawn with replacement, and so are test rows, the same for both arms and all seeds. A few seeds drawn
    with replacement vary less than seeds do, `sqrt((S - 1) / S)` times, so their deviations are made larger by that.
    Without rows the interval is Student's over the seeds.

    Args:
        arm (`Sequence[dict[str, Any]]`):
            The metric of each seed's run.
        baseline (`Sequence[dict[str, Any]]`):
            The baseline's, of the same seeds and rows.

    Returns:
        `dict[str, Any]`: `difference`, `low`, `high` (both `None` for one seed without rows), `per_seed`, `verdict`.
    """
    per_seed = [ours["mean"] - theirs["mean"] for ours, theirs in zip(arm, baseline, strict=True)]
    low, high = _interval(arm, baseline, np.array(per_seed))
    verdict = _verdict(low, high, arm[0]["higher_is_better"])
    return {
        "difference": statistics.fmean(per_seed),
        "low": low,
        "high": high,
        "per_seed": per_seed,
        "verdict": verdict,
    }


def _interval(arm, baseline, per_seed: np.ndarray) -> tuple[float | None, float | None]:
    num_seeds = len(per_seed)
    if any(metric["rows"] is None for metric in (*arm, *baseline)):
        return _interval_of_seeds(per_seed) if num_seeds > 1 else (None, None)
    generator = np.random.default_rng(0)
    num_rows = len(arm[0]["rows"])
    widening = math.sqrt(num_seeds / max(num_seeds - 1, 1))
    draws = []
    for _ in range(0, DRAWS, BLOCK):
        seeds = generator.integers(num_seeds, size=(BLOCK, num_seeds))
        times = generator.multinomial(num_rows, [1 / num_rows] * num_rows, size=BLOCK)
        differences = _means(arm, times) - _means(baseline, times)
        mean = differences.mean(axis=1)
        drawn = np.take_along_axis(differences, seeds, axis=1).mean(axis=1)
        draws.append(mean + widening * (drawn - mean))
    outside = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(draws), [outside, 1 - outside])
    return float(low), float(high)


def _interval_of_seeds(per_seed: np.ndarray) -> tuple[float, float]:
    half = stats.t.ppf((1 + LEVEL) / 2, len(per_seed) - 1) * per_seed.std(ddof=1) / math.sqrt(len(per_seed))
    return float(per_seed.mean() - half), float(per_seed.mean() + half)


def _means(metrics, times: np.ndarray) -> np.ndarray:
    """Means of the metrics for each draw, in which a row is there so many times."""
    counts = [metric["counts"] or [1] * len(metric["rows"]) for metric in metrics]
    return (times @ np.array([metric["rows"] for metric in metrics]).T) / (times @ np.array(counts).T)


def _verdict(low: float | None, high: float | None, higher_is_better: bool | None) -> str:
    if low is None:
        return UNKNOWN
    if low <= 0 <= high:
        return NOT_SHOWN
    if higher_is_better is None:
        return DIFFERENT
    return BETTER if (low > 0) == higher_is_better else WORSE
