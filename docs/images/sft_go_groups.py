"""
Draws `sft_go_groups.svg`: the tokens of two examples in their groups, the loss of each token, and the worst group.

    python docs/images/sft_go_groups.py benchmarks/results/sft_go_groups.json
"""

import json
import sys
from pathlib import Path

from drawing import INK, MONOSPACE, ORANGE, TEAL, WIDTH, canvas, chip, save, set_style
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


GROUPS = {"important": (1, ORANGE), "unimportant": (0, TEAL)}
SAMPLE_HEIGHT, LINE_HEIGHT = 214, 38
BARS_AT, BAR_LENGTH = 156, 150


def draw_tokens(axes: Axes, sample: dict, top: float) -> None:
    """The lines of the response, with the loss below each token."""
    colors = dict(GROUPS.values())
    x, y = 4, top
    for token, group, nll in zip(sample["tokens"], sample["group_ids"], sample["nll"], strict=True):
        width = max(26, 5.6 * len(token) + 8)
        chip(axes, x, y, width, token, colors[group])
        axes.text(x + width / 2, y + 25, f"{nll:.2f}", size=9, ha="center", va="center_baseline")
        x += width + 4
        if token == "↵":
            x, y = 4, y + LINE_HEIGHT


def draw_groups(axes: Axes, sample: dict, top: float, scale: float) -> None:
    """The mean loss of each group, and the loss of the example."""
    for number, (name, (group, color)) in enumerate(GROUPS.items()):
        y, nll, is_worst = top + 18 * number, sample["group_nll"][group], sample["worst_group"] == group
        style = {"weight": "bold" if is_worst else "normal", "va": "center_baseline"}
        axes.text(4, y, f"{name}: {nll:.2f}{', max' if is_worst else ''}", **style)
        axes.barh(y, nll * scale, 10, left=BARS_AT, color=color, alpha=1 if is_worst else 0.4)
    weight, mean = sample["worst_group_weight"], sum(sample["nll"]) / len(sample["nll"])
    worst = sample["group_nll"][sample["worst_group"]]
    terms = f"{1 - weight:.1f} · {mean:.2f} + {weight:.1f} · {worst:.2f} = {sample['loss']:.2f}"
    axes.text(4, top + 36, f"loss = {terms}", va="center_baseline")


def draw(samples: list[dict], path: Path) -> None:
    """One example below the other."""
    set_style()
    height = SAMPLE_HEIGHT * len(samples)
    axes = canvas(plt.figure(figsize=(WIDTH / 72, height / 72)), 0, WIDTH, height)
    scale = BAR_LENGTH / max(max(sample["group_nll"]) for sample in samples)
    for number, sample in enumerate(samples):
        top = SAMPLE_HEIGHT * number
        problem = sample["prompt"].split("problem: ")[1].split("\n")[0]
        axes.text(4, top + 14, f"prompt: ... {problem}", color=INK, family=MONOSPACE, size=9)
        draw_tokens(axes, sample, top + 28)
        draw_groups(axes, sample, top + 150, scale)
    save(axes.figure, path)


if __name__ == "__main__":
    results = json.loads(Path(sys.argv[1]).read_text())
    draw(results["samples"], Path(__file__).with_suffix(".svg"))
