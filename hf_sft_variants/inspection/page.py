"""Rows as one self-contained HTML page."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from trl import SFTConfig

from ..launch.preparation import Recipe
from ..pages import render
from .histogram import group_class, histogram
from .probabilities import reading
from .rows import Column, Row, View
from .text import row_counts
from .token_text import visible_pieces


# Settings that choose the tokens to train on, whatever the method
_DATA_SETTINGS = (
    "max_length",
    "truncation_mode",
    "packing",
    "packing_strategy",
    "completion_only_loss",
    "assistant_only_loss",
    "chat_template_path",
)


def render_page(view: View, recipe: Recipe, settings: dict[str, object]) -> str:
    """
    Render the page with its header, legend, histograms and rows. The header shows the recipe and `settings`, as
    returned by [`page_settings`].
    """
    groups = [column for column in view.columns if column.is_group]
    scores = [column for column in view.columns if column.kind == "score"]
    ranges = {column.name: _range(view, column) for column in scores if column.is_score}
    return render(
        __package__,
        title=Path(recipe.path).name,
        header=_header(view, recipe),
        settings=settings,
        groups=groups,
        totals=[sum((row.group_counts(column) for row in view.rows), Counter()) for column in groups],
        group_class=group_class,
        ranges=ranges,
        histograms=[histogram(view, column, groups[0] if groups else None) for column in scores],
        reading=reading(view),
        rows=view.rows,
        counts=lambda row: " · ".join(row_counts(row, view.columns)),
        tokens=lambda row: _tokens(row, view, groups, ranges),
        data=_json(view),
    )


def page_settings(recipe: Recipe) -> dict[str, object]:
    """The recipe's values of the method's settings, and of those that choose the tokens in the loss."""
    common = {field.name for field in fields(SFTConfig)}
    names = [field.name for field in fields(recipe.training_args) if field.init and field.name not in common]
    return {name: getattr(recipe.training_args, name) for name in [*names, *_DATA_SETTINGS]}


def _header(view: View, recipe: Recipe) -> dict[str, str]:
    script_args = recipe.script_args
    data = [mixed.path for mixed in recipe.dataset_args.datasets] or [script_args.dataset_name]
    if script_args.dataset_config:
        data.append(script_args.dataset_config)
    return {
        "recipe": recipe.path,
        "method": recipe.trainer_class.__name__,
        "model": recipe.model_args.model_name_or_path,
        "data set": f"{', '.join(data)}, split {script_args.dataset_train_split}",
        "shown": f"{view.title()} as prepared for training",
    }


def _range(view: View, column: Column) -> tuple[float, float]:
    values = [value for row in view.rows for value in row.values_in_loss(column) if math.isfinite(value)]
    return min(values, default=0.0), max(values, default=0.0)


def _tokens(
    row: Row, view: View, groups: list[Column], ranges: dict[str, tuple[float, float]]
) -> Iterator[dict[str, Any]]:
    """Text, CSS classes and shades of each token; tokens that are not in the loss have no groups or shades."""
    for position, (token_id, in_loss) in enumerate(zip(row.input_ids, row.in_loss(), strict=True)):
        classes, shades = ["t"], []
        if token_id in view.special:
            classes.append("special")
        if in_loss:
            groups_here = [column.group_of(row.values[column.name][position]) for column in groups]
            classes += ["in-loss", *(f"c{number}-{group}" for number, group in enumerate(groups_here))]
            shades = [_shade(row.values[name][position], *ends) for name, ends in ranges.items()]
        text = view.texts[token_id]
        yield {"pieces": visible_pieces(text), "classes": classes, "shades": shades, "ends_line": "\n" in text}


def _shade(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low and math.isfinite(value) else 0.0


def _json(view: View) -> str:
    """Data of each token, shown when the pointer or the focus is on it."""
    columns = [{"name": column.name, "names": column.names} for column in view.columns]
    rows = {
        row.number: {
            "ids": row.input_ids,
            "labels": row.labels,
            "values": [_rounded(row.values[column.name]) for column in view.columns],
        }
        for row in view.rows
    }
    data = {"columns": columns, "texts": view.texts, "rows": rows}
    # So that no text can end the script element
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _rounded(values: list) -> list:
    """Floats as text with four digits, because JSON has no infinity."""
    return [f"{value:.4g}" if isinstance(value, float) else value for value in values]
