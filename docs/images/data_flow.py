"""
Draws `data_flow.svg`: the way of a data set through `AnnotatedSFTTrainer` to the loss.

    python docs/images/data_flow.py
"""

from pathlib import Path

from drawing import INK, MONOSPACE, ON_COLOR, ORANGE, TEAL, WIDTH, box, canvas, save, set_style
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


TRL, BASE, METHOD = "TRL", "AnnotatedSFTTrainer", "a method overrides"
COLORS = {TRL: "none", BASE: TEAL, METHOD: ORANGE}

# Name, whose it is, and what happens there
ONCE = [
    ("data set", TRL, "messages, prompt and completion, or text"),
    ("tokenize", TRL, "SFTTrainer's preparation: chat template,\ninput_ids, labels (-100: not in the loss)"),
    ("annotate_untruncated", METHOD, "adds columns with a value for each token,\nfound in whole examples"),
    ("truncate", BASE, "to max_length, annotations\nwith the tokens"),
    ("annotate", METHOD, "adds columns with a value for each token;\nmay run models over the data"),
    ("pack", BASE, "with packing=True: several examples a row,\nthe annotations along with the tokens"),
]
EACH_STEP = [
    ("collator", BASE, "TRL's pads tokens, ours annotations"),
    ("model", TRL, ""),
    ("AnnotatedBatch", BASE, ""),
    ("compute_annotated_loss", METHOD, "sums over the micro-batch, divided by\nthe counts of the step; fills metrics"),
    ("backward, log", TRL, "metrics are summed over processes,\nthen divided"),
    ("callbacks", TRL, "follow the run: SFTKey's next stage,\nSFTMix's pairs"),
]

STEP, BOX_HEIGHT = 40, 26
BOX_AT, BOX_WIDTH, TEXT_AT = 4, 144, 158
MIDDLE = BOX_AT + BOX_WIDTH / 2
COUNT_AT, COUNT_WIDTH = 172, 84


def draw_box(axes: Axes, x: float, y: float, width: float, name: str, whose: str) -> None:
    is_filled = COLORS[whose] != "none"
    box(axes, x, y, width, BOX_HEIGHT, facecolor=COLORS[whose], edgecolor=COLORS[whose] if is_filled else INK)
    style = {"color": ON_COLOR if is_filled else INK, "family": MONOSPACE}
    axes.text(x + width / 2, y + BOX_HEIGHT / 2, name, ha="center", va="center_baseline", **style)


def draw_arrow(axes: Axes, *points: tuple[float, float]) -> None:
    """Along the points; the head is at the last one."""
    axes.plot(*zip(*points[:-1], strict=True), color=INK, linewidth=1)
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style)


def draw_column(axes: Axes, steps: list[tuple[str, str, str]], top: float) -> None:
    """Boxes one below the other, with arrows from each to the next."""
    for number, (name, whose, text) in enumerate(steps):
        y = top + STEP * number
        draw_box(axes, BOX_AT, y, BOX_WIDTH, name, whose)
        axes.text(TEXT_AT, y + BOX_HEIGHT / 2, text, va="center_baseline")
        if number < len(steps) - 1:
            draw_arrow(axes, (MIDDLE, y + BOX_HEIGHT), (MIDDLE, y + STEP - 2))


def draw_counts(axes: Axes, collator_top: float) -> None:
    """Beside the model: from the batches of a whole step to the loss of each of them."""
    model, batch = collator_top + STEP, collator_top + 2 * STEP
    start, middle, between = BOX_AT + BOX_WIDTH - 16, COUNT_AT + COUNT_WIDTH / 2, model - (STEP - BOX_HEIGHT) / 2
    draw_arrow(axes, (start, collator_top + BOX_HEIGHT), (start, between), (middle, between), (middle, model - 1))
    draw_box(axes, COUNT_AT, model, COUNT_WIDTH, "count_items", METHOD)
    entry = batch + BOX_HEIGHT / 2
    draw_arrow(axes, (middle, model + BOX_HEIGHT), (middle, entry), (BOX_AT + BOX_WIDTH + 2, entry))
    axes.text(middle + 8, entry, "num_items: counts over all\nmicro-batches and processes", va="center")
    axes.text(MIDDLE + 8, batch - 7, "log_probs", size=9, va="center_baseline")


def draw(path: Path) -> None:
    """What happens once above, what happens at each step below, whose it is at the bottom."""
    set_style()
    line = STEP * len(ONCE) + 16
    top = line + 34
    legend = top + STEP * len(EACH_STEP) + 6
    height = legend + BOX_HEIGHT + 4
    axes = canvas(plt.figure(figsize=(WIDTH / 72, height / 72)), 0, WIDTH, height)
    draw_column(axes, ONCE, 4)
    axes.plot([4, WIDTH - 4], [line, line], color=INK, linewidth=1, linestyle="--")
    axes.text(WIDTH - 4, line - 7, "once, before training", ha="right")
    axes.text(WIDTH - 4, line + 14, "each optimizer step", ha="right")
    draw_arrow(axes, (MIDDLE, 4 + STEP * (len(ONCE) - 1) + BOX_HEIGHT), (MIDDLE, top - 2))
    draw_column(axes, EACH_STEP, top)
    draw_counts(axes, top)
    for x, width, whose in ((4, 60, TRL), (76, 144, BASE), (232, 144, METHOD)):
        draw_box(axes, x, legend, width, whose, whose)
    save(axes.figure, path)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".svg"))
