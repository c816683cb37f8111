"""Shared by the pictures in this folder: colors readable on white and on black, and how pictures are saved."""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch


TEAL, ORANGE, INK = "#2a9d8f", "#e76f51", "#7a7a7a"
WIDTH = 384  # points: narrow enough that text stays legible on a phone
ON_COLOR = "#101010"  # text on a teal or an orange chip
MONOSPACE = ["DejaVu Sans Mono", "monospace"]


def set_style() -> None:
    """Keep text as text, and draw everything without a color of its own in gray."""
    plt.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10})
    for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        plt.rcParams[name] = INK


def save(figure: Figure, path: Path) -> None:
    """Save without a date and with ids derived from the name, so that the same picture has the same bytes."""
    plt.rcParams["svg.hashsalt"] = path.name
    figure.savefig(path, transparent=True, metadata={"Date": None})


def canvas(figure: Figure, left: float, width: float, height: float) -> Axes:
    """Empty axes over the whole height, with points as units and the origin in the upper left corner."""
    figure_width, figure_height = figure.get_size_inches() * 72
    axes = figure.add_axes(
        (left / figure_width, 1 - height / figure_height, width / figure_width, height / figure_height)
    )
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return axes


def box(axes: Axes, x: float, y: float, width: float, height: float, **style) -> None:
    """A box with rounded corners; `x` and `y` are its upper left corner."""
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=4", **style))


def chip(axes: Axes, x: float, y: float, width: float, text: str, color: str, filled: bool = True) -> None:
    """A token."""
    style = {"facecolor": color, "edgecolor": color} if filled else {"facecolor": "none", "edgecolor": color}
    box(axes, x, y, width, 16, linewidth=1, **style)
    color = ON_COLOR if filled else INK
    # A dollar sign would start a formula
    text = text.replace("$", r"\$")
    axes.text(x + width / 2, y + 8, text, color=color, family=MONOSPACE, size=9, ha="center", va="center_baseline")
