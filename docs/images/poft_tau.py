"""
Draws `poft_tau.svg`: the mean weight of clean and of corrupted examples over PoFT training.

    python docs/images/poft_tau.py benchmarks/results/poft_corrupted_answers.json
"""

import json
import sys
from pathlib import Path

from drawing import INK, ORANGE, TEAL, WIDTH, save, set_style
from matplotlib import pyplot as plt


COLORS = {"clean": TEAL, "corrupted": ORANGE}


def draw(runs: list[dict], path: Path) -> None:
    """The mean over seeds, on the range from the lowest to the highest seed."""
    set_style()
    figure, axes = plt.subplots(figsize=(WIDTH / 72, 3.2), layout="constrained")
    for kind, color in COLORS.items():
        steps = [step for step, _ in runs[0]["tau"][kind]]
        seeds = list(zip(*([tau for _, tau in run["tau"][kind]] for run in runs), strict=True))
        axes.fill_between(steps, list(map(min, seeds)), list(map(max, seeds)), color=color, alpha=0.25, linewidth=0)
        axes.plot(steps, [sum(values) / len(values) for values in seeds], color=color, marker="o", label=kind)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean weight τ of the examples")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, labelcolor=INK)
    save(figure, path)


if __name__ == "__main__":
    results = json.loads(Path(sys.argv[1]).read_text())
    draw([run for run in results["runs"] if run["arm"] == "poft"], Path(__file__).with_suffix(".svg"))
