"""Histogram of a score as inline SVG, its bars stacked by group."""

import math
from collections import Counter
from html import escape

from .rows import Column, View


_BARS, _WIDTH, _HEIGHT = 40, 640, 130


def render_histogram(view: View, score: Column, groups: Column | None) -> str:
    """
    Draw the distribution of a score over tokens in the loss, or over examples if each has a single score, as a
    `<figure>`. The groups, if any, stack the bars of token scores.
    """
    groups = None if score.per_example else groups
    pairs = _scores_with_groups(view, score, groups)
    units = "examples" if score.per_example else "tokens in the loss"
    if not pairs:
        return f"<p>{escape(score.name)}: no {units}.</p>"
    low, high = min(value for value, _ in pairs), max(value for value, _ in pairs)
    step = (high - low) / _BARS
    counts = Counter((min(int((value - low) / step), _BARS - 1) if step else 0, group) for value, group in pairs)
    heights = Counter(bar for bar, _ in counts.elements())
    tallest = max(heights.values())
    bars = [
        f"<g><title>{low + bar * step:.4g} to {low + (bar + 1) * step:.4g}: {_in_words(bar, counts, groups)}</title>"
        f"{_stack(bar, counts, tallest)}</g>"
        for bar in sorted(heights)
    ]
    name, base = escape(score.name), _HEIGHT + 18
    return (
        f"<figure><figcaption><b>{name}</b> of {len(pairs):,} {units} on this page; the tallest bar is "
        f'{tallest:,}</figcaption><svg viewBox="0 0 {_WIDTH} {base + 4}" role="img" '
        f'aria-label="Histogram of {name}">{"".join(bars)}<path class="axis" d="M0 {_HEIGHT}H{_WIDTH}"/>'
        f'<text x="0" y="{base}">{low:.4g}</text>'
        f'<text x="{_WIDTH / 2}" y="{base}" text-anchor="middle">{(low + high) / 2:.4g}</text>'
        f'<text x="{_WIDTH}" y="{base}" text-anchor="end">{high:.4g}</text></svg></figure>'
    )


def _scores_with_groups(view: View, score: Column, groups: Column | None) -> list[tuple[float, int]]:
    pairs = []
    for row in view.rows:
        scores = row.values_in_loss(score)
        row_groups = map(groups.group_of, row.values_in_loss(groups)) if groups else [-1] * len(scores)
        pairs += zip(scores, row_groups, strict=True)
    return [(value, group) for value, group in pairs if math.isfinite(value)]


def _groups_in(bar: int, counts: Counter) -> list[int]:
    return sorted((group for other, group in counts if other == bar), reverse=True)


def _in_words(bar: int, counts: Counter, groups: Column | None) -> str:
    if groups is None:
        return str(counts[bar, -1])
    named = [(counts[bar, group], groups.names.get(group, "no group")) for group in _groups_in(bar, counts)]
    return escape(", ".join(f"{count} {name}" for count, name in named))


def _stack(bar: int, counts: Counter, tallest: int) -> str:
    top, width, rectangles = _HEIGHT, _WIDTH / _BARS, []
    for group in _groups_in(bar, counts):
        height = counts[bar, group] / tallest * (_HEIGHT - 8)
        top -= height
        rectangles.append(
            f'<rect class="{group_class(group)}" x="{bar * width + 1:.1f}" y="{top:.1f}" '
            f'width="{width - 2:.1f}" height="{height:.1f}"/>'
        )
    return "".join(rectangles)


def group_class(group: int) -> str:
    return f"bar-{group}" if group >= 0 else "bar-none"
