"""
Draws `sftmix_halves.svg`: examples ranked by confidence and split into halves, and the mixed positions of one pair.

    python docs/images/sftmix_halves.py benchmarks/results/sftmix_halves.json
"""

import json
import sys
from pathlib import Path

from drawing import INK, ORANGE, TEAL, WIDTH, canvas, chip, save, set_style
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


COLORS = {"confident": TEAL, "unconfident": ORANGE}
PAIR_AT, ROW_HEIGHT, HEADER = 192, 20, 42


def draw_halves(figure: Figure, results: dict) -> None:
    axes = figure.add_axes((0.12, 0.13, 0.36, 0.8))
    ranked = list(zip(results["half"], results["mean_perplexity"], strict=True))
    for half, color in COLORS.items():
        ranks = [rank for rank, (of_example, _) in enumerate(ranked, start=1) if of_example == half]
        axes.scatter(ranks, [ranked[rank - 1][1] for rank in ranks], s=9, color=color, linewidths=0)
        middle = ranks[len(ranks) // 2]
        axes.text(middle, 1, half, color=color, ha="center", transform=axes.get_xaxis_transform())
    axes.axvline(len(ranked) / 2 + 0.5, color=INK, linewidth=1, linestyle="--")
    axes.set_xlabel("example, by confidence")
    axes.set_ylabel("mean perplexity")
    axes.spines[["top", "right"]].set_visible(False)


def draw_pair(axes: Axes, pair: dict) -> None:
    """The labels of both examples, aligned by position; filled if mixed."""
    columns = {"confident": 58, "unconfident": 152}
    shares = {"confident": f"λ = {pair['lambda']:.2f}", "unconfident": f"1 − λ = {1 - pair['lambda']:.2f}"}
    axes.text(10, 30, "n", size=9, ha="center")
    for half, x in columns.items():
        axes.text(x, 14, half, color=COLORS[half], ha="center")
        axes.text(x, 30, shares[half], size=9, ha="center")
        for row, token in enumerate(pair[half]):
            y, width = HEADER + ROW_HEIGHT * row, max(26, 5.6 * len(token) + 8)
            chip(axes, x - width / 2, y, width, token, COLORS[half], filled=row < pair["mixed_positions"])
    for row in range(max(len(pair[half]) for half in columns)):
        y = HEADER + ROW_HEIGHT * row + 8
        axes.text(10, y, row + 1, size=9, ha="center", va="center_baseline")
        if row < pair["mixed_positions"]:
            axes.text(105, y, "+", size=9, ha="center", va="center_baseline")


def draw(results: dict, path: Path) -> None:
    """The halves on the left, a pair on the right."""
    set_style()
    pair = results["pair"]
    height = HEADER + ROW_HEIGHT * max(len(pair["confident"]), len(pair["unconfident"])) + 4
    figure = plt.figure(figsize=(WIDTH / 72, height / 72))
    draw_halves(figure, results)
    draw_pair(canvas(figure, PAIR_AT, WIDTH - PAIR_AT, height), pair)
    save(figure, path)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(__file__).with_suffix(".svg"))
