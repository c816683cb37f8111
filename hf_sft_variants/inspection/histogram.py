"""Histogram of a score, its bars stacked by group."""

import math
from collections import Counter
from typing import Any

from .rows import Column, View


_BARS, _WIDTH, _HEIGHT = 40, 640, 130


def histogram(view: View, score: Column, groups: Column | None) -> dict[str, Any]:
    """
    Distribution of a score over the tokens in the loss, or over the examples if each has a single score, in the
    coordinates of an SVG. The groups, if any, stack the bars of token scores.
    """
    groups = None if score.per_example else groups
    pairs = _scores_with_groups(view, score, groups)
    units = "examples" if score.per_example else "tokens in the loss"
    if not pairs:
        return {"name": score.name, "units": units, "count": 0}
    low, high = min(value for value, _ in pairs), max(value for value, _ in pairs)
    step = (high - low) / _BARS
    bars: dict[int, Counter[int]] = {}  # number of scores in each bar by group
    for value, group in pairs:
        bar = min(int((value - low) / step), _BARS - 1) if step else 0
        bars.setdefault(bar, Counter())[group] += 1
    tallest = max(map(Counter.total, bars.values()))
    return {
        "name": score.name,
        "units": units,
        "count": len(pairs),
        "tallest": tallest,
        "width": _WIDTH,
        "height": _HEIGHT,
        "marks": (low, (low + high) / 2, high),
        "bars": [
            {
                "title": f"{low + bar * step:.4g} to {low + (bar + 1) * step:.4g}: {_in_words(counts, groups)}",
                "parts": _stack(bar, counts, tallest),
            }
            for bar, counts in sorted(bars.items())
        ],
    }


def _scores_with_groups(view: View, score: Column, groups: Column | None) -> list[tuple[float, int]]:
    pairs = []
    for row in view.rows:
        scores = row.values_in_loss(score)
        row_groups = map(groups.group_of, row.values_in_loss(groups)) if groups else [-1] * len(scores)
        pairs += zip(scores, row_groups, strict=True)
    return [(value, group) for value, group in pairs if math.isfinite(value)]


def _in_words(counts: Counter[int], groups: Column | None) -> str:
    if groups is None:
        return str(counts[-1])
    return ", ".join(
        f"{count} {groups.names.get(group, 'no group')}" for group, count in sorted(counts.items(), reverse=True)
    )


def _stack(bar: int, counts: Counter[int], tallest: int) -> list[dict[str, Any]]:
    """Rectangles of a bar, the highest group at the bottom."""
    top, width, parts = _HEIGHT, _WIDTH / _BARS, []
    for group, count in sorted(counts.items(), reverse=True):
        height = count / tallest * (_HEIGHT - 8)
        top -= height
        place = {"x": bar * width + 1, "y": top, "width": width - 2, "height": height}
        parts.append({"class": group_class(group), **{name: f"{value:.1f}" for name, value in place.items()}})
    return parts


def group_class(group: int) -> str:
    return f"bar-{group}" if group >= 0 else "bar-none"
