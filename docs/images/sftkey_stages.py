"""
Draws `sftkey_stages.svg`: learning rate and losses of a two-stage run at each step.

    hf-sft-variants quickstart --train-size 96
    trl sft --config recipes/quickstart/sftkey.yaml --warmup_steps 3 --logging_steps 1 --save_strategy epoch
    cp quickstart/runs/sftkey/checkpoint-24/trainer_state.json benchmarks/results/sftkey_stages.json
    python docs/images/sftkey_stages.py benchmarks/results/sftkey_stages.json
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

from drawing import INK, ORANGE, TEAL, WIDTH, save, set_style
from matplotlib import pyplot as plt


STAGES = ("stage 1: the whole response", "stage 2: the key alone")
LOSSES = {"sftkey/key_nll": ("key", ORANGE), "sftkey/other_nll": ("other tokens", TEAL)}


def draw(state: dict, path: Path) -> None:
    """The learning rate above, the losses below."""
    set_style()
    logs = [log for log in state["log_history"] if "learning_rate" in log]
    starts = state["stateful_callbacks"]["StageSwitchCallback"]["attributes"]["_starts"]
    figure, (top, bottom) = plt.subplots(
        2, figsize=(WIDTH / 72, 4.2), height_ratios=(2, 3), sharex=True, layout="constrained"
    )
    # One line per stage
    for stage, (start, end) in zip(STAGES, pairwise(starts), strict=True):
        of_stage = logs[start:end]
        top.plot([log["step"] for log in of_stage], [log["learning_rate"] for log in of_stage], color=INK, marker=".")
        top.text((start + end + 1) / 2, 1.04, stage, transform=top.get_xaxis_transform(), ha="center")
    for name, (label, color) in LOSSES.items():
        steps, values = zip(*[(log["step"], log[name]) for log in logs if name in log], strict=True)
        bottom.plot(steps, values, color=color, marker=".", label=label)
    for axes in (top, bottom):
        axes.axvline(starts[1] + 0.5, color=INK, linewidth=1, linestyle="--")
        axes.spines[["top", "right"]].set_visible(False)
    top.set_ylabel("learning rate")
    top.yaxis.set_major_formatter("{x:.4f}")
    bottom.set_ylabel("loss, nats per token")
    bottom.set_xlabel("optimizer step")
    bottom.set_yscale("log")
    bottom.yaxis.set_major_formatter("{x:g}")
    bottom.legend(frameon=False, labelcolor=INK)
    save(figure, path)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(__file__).with_suffix(".svg"))
