"""Learning curves, whose lines differ in colour and in dashes."""

import statistics
from itertools import chain
from typing import Any


WIDTH, HEIGHT = 640, 240
_COLOURS = 7
_DASHES = ("none", "7 4", "2 3", "10 3 2 3", "14 5", "4 2 1 2 1 2")
_WIDTHS = (2, 1, 4)  # once all dashes are used, the next arms have another width


def learning_curve(results: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """
    The plain negative log-likelihood logged by an arm's runs, as (step, mean over the seeds). Our trainers log `nll`;
    plain SFT's is its loss.
    """
    by_step: dict[int, list[float]] = {}
    for result in results:
        for log in result["log_history"]:
            value = log.get("nll", log.get("loss"))  # the summary at the end has neither
            if value is not None:  # training may have diverged
                by_step.setdefault(log["step"], []).append(value)
    return [
        (step, statistics.fmean(values)) for step, values in sorted(by_step.items()) if len(values) == len(results)
    ]


def line_styles(number: int) -> list[str]:
    """CSS of `number` lines that can be told apart."""
    return [
        f"stroke: var(--arm-{i % _COLOURS}); stroke-dasharray: {_DASHES[i % len(_DASHES)]}; "
        f"stroke-width: {_WIDTHS[i // len(_DASHES) % len(_WIDTHS)]};"
        for i in range(number)
    ]


def plot(curves: dict[str, list[tuple[int, float]]]) -> dict[str, Any] | None:
    """Each arm's points in the coordinates of an SVG, with the ends of the axes; `None` without any points."""
    points = list(chain(*curves.values()))
    if not points:
        return None
    last, low, high = max(step for step, _ in points), min(y for _, y in points), max(y for _, y in points)
    across, down = WIDTH / last, HEIGHT / (high - low or 1.0)
    lines = {
        arm: " ".join(f"{step * across:.1f},{(high - y) * down:.1f}" for step, y in curve)
        for arm, curve in curves.items()
        if curve
    }
    return {"lines": lines, "last": last, "low": low, "high": high, "width": WIDTH, "height": HEIGHT}
