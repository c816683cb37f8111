"""Learning curves as inline SVG, whose lines differ in colour and in dashes."""

import statistics
from html import escape
from typing import Any


_WIDTH, _HEIGHT = 640, 240
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


def line_styles(arms: list[str]) -> str:
    """CSS of the arms' lines."""
    return "\n".join(
        f"svg .line-{i} {{ stroke: var(--arm-{i % _COLOURS}); stroke-dasharray: {_DASHES[i % len(_DASHES)]}; "
        f"stroke-width: {_WIDTHS[i // len(_DASHES) % len(_WIDTHS)]}; }}"
        for i in range(len(arms))
    )


def render_curves(curves: dict[str, list[tuple[int, float]]], arms: list[str], title: str) -> str:
    """
    Draw each arm's points as a curve in one `<figure>` with a legend. All `arms` of the study together set the styles.
    """
    curves = {arm: points for arm, points in curves.items() if points}
    if not curves:
        return '<p class="note">No loss was logged: set <code>logging_steps</code>.</p>'
    points = [point for curve in curves.values() for point in curve]
    last, low, high = max(step for step, _ in points), min(y for _, y in points), max(y for _, y in points)
    lines = [
        f'<polyline class="curve line-{arms.index(arm)}" points="{_points(curve, last, low, high)}">'
        f"<title>{escape(arm)}</title></polyline>"
        for arm, curve in curves.items()
    ]
    legend = "".join(f"<li>{_sign(arms.index(arm))} {escape(arm)}</li>" for arm in curves)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><ul class="legend">{legend}</ul>'
        f'<svg viewBox="-50 -8 {_WIDTH + 60} {_HEIGHT + 34}" role="img" aria-label="{escape(title)}">'
        f'<path class="axis" d="M0 0V{_HEIGHT}H{_WIDTH}"/>{"".join(lines)}'
        f'<text x="-6" y="8" text-anchor="end">{high:.3g}</text>'
        f'<text x="-6" y="{_HEIGHT}" text-anchor="end">{low:.3g}</text>'
        f'<text x="0" y="{_HEIGHT + 20}">0</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 20}" text-anchor="end">{last} steps</text></svg></figure>'
    )


def _sign(number: int) -> str:
    return f'<svg viewBox="0 0 40 8" aria-hidden="true"><path class="curve line-{number}" d="M0 4H40"/></svg>'


def _points(curve: list[tuple[int, float]], last: int, low: float, high: float) -> str:
    span = high - low or 1.0
    return " ".join(f"{step / last * _WIDTH:.1f},{(high - value) / span * _HEIGHT:.1f}" for step, value in curve)
