"""Rows as one self-contained HTML page."""

import importlib.resources
import json
import math
from collections import Counter
from dataclasses import fields
from html import escape
from itertools import starmap
from pathlib import Path
from string import Template

from trl import SFTConfig

from ..launch.preparation import Recipe
from .histogram import group_class, render_histogram
from .rows import Column, Row, View
from .text import row_counts
from .token_text import visible_pieces


_COLOURS = 7
_BORDERS = ("2px dotted", "3px solid", "2px dashed", "4px double")

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
    Render the page with its header, legend, histograms and rows.

    Args:
        view (`View`):
            View from [`read_view`].
        recipe (`Recipe`):
            Recipe that the header describes.
        settings (`dict[str, object]`):
            Settings from [`page_settings`].
    """
    template = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    groups = [column for column in view.columns if column.is_group]
    scores = [column for column in view.columns if column.kind == "score"]
    shades = {column.name: _range(view, column) for column in scores if column.is_score}
    return Template(template).substitute(
        title=escape(Path(recipe.path).name),
        header=_header(view, recipe),
        settings="".join(_definition(name, value) for name, value in settings.items()),
        styles="\n".join([*starmap(_group_styles, enumerate(groups)), *map(_shade_rule, range(len(shades)))]),
        legend=_legend(view, groups, shades),
        histograms="".join(render_histogram(view, column, groups[0] if groups else None) for column in scores),
        rows="".join(_row(row, view, groups, shades) for row in view.rows),
        data=_json(view),
    )


def page_settings(recipe: Recipe) -> dict[str, object]:
    """The recipe's values of the method's settings, and of those that choose the tokens in the loss."""
    common = {field.name for field in fields(SFTConfig)}
    names = [field.name for field in fields(recipe.training_args) if field.init and field.name not in common]
    return {name: getattr(recipe.training_args, name) for name in [*names, *_DATA_SETTINGS]}


def _header(view: View, recipe: Recipe) -> str:
    script_args = recipe.script_args
    data = [mixed.path for mixed in recipe.dataset_args.datasets] or [script_args.dataset_name]
    if script_args.dataset_config:
        data.append(script_args.dataset_config)
    lines = {
        "recipe": recipe.path,
        "method": recipe.trainer_class.__name__,
        "model": recipe.model_args.model_name_or_path,
        "data set": f"{', '.join(data)}, split {script_args.dataset_train_split}",
        "shown": f"{view.title()} as prepared for training",
    }
    return "".join(_definition(name, value) for name, value in lines.items())


def _definition(name: str, value: object) -> str:
    return f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"


def _group_styles(number: int, column: Column) -> str:
    """Groups differ in colour, line style and, if there are more than two, a number after the token."""
    rules = []
    for group in column.names:
        colour, token = f"var(--group-{group % _COLOURS})", f".groups-{number} .in-loss.c{number}-{group}"
        weight = ";font-weight:700" if group == 1 else ""
        rules.append(f"{token}{{border-bottom:{_BORDERS[group % len(_BORDERS)]} {colour}{weight}}}")
        if len(column.names) > 2:
            rules.append(f'{token}::after{{content:"{group}";color:{colour}}}')
        if number == 0:
            rules.append(f".{group_class(group)}{{fill:{colour}}}")
    return "\n".join(rules)


def _shade_rule(number: int) -> str:
    """CSS that shades tokens by one of their scores."""
    return f".scores-{number} .tokens .t{{--s:var(--s{number},0)}}"


def _legend(view: View, groups: list[Column], shades: dict[str, tuple[float, float]]) -> str:
    parts = [
        _choice("groups", number, column.name, len(groups)) + _group_key(view, number, column)
        for number, column in enumerate(groups)
    ]
    parts += [
        _choice("scores", number, name, len(shades)) + _score_key(*shades[name]) for number, name in enumerate(shades)
    ]
    return "".join(f"<p>{part}</p>" for part in parts)


def _choice(kind: str, number: int, name: str, choices: int) -> str:
    """The column's name, with a radio button if there are several to choose from."""
    if choices == 1:
        return f"<b>{escape(name)}</b> "
    checked = " checked" if number == 0 else ""
    return f'<label><input type="radio" name="{kind}" value="{number}"{checked}><b>{escape(name)}</b></label> '


def _group_key(view: View, number: int, column: Column) -> str:
    totals = Counter()
    for row in view.rows:
        totals.update(row.group_counts(column))
    signs = [
        f'<span class="sign"><span class="t in-loss c{number}-{group}">{escape(name)}</span> {totals[group]:,}</span>'
        for group, name in column.names.items()
    ]
    return f'by line: <span class="groups-{number}">{" ".join(signs)}</span>'


def _score_key(low: float, high: float) -> str:
    return f'by shade: {low:.4g} <span class="ramp"></span> {high:.4g}'


def _range(view: View, column: Column) -> tuple[float, float]:
    values = [value for row in view.rows for value in row.values_in_loss(column) if math.isfinite(value)]
    return min(values, default=0.0), max(values, default=0.0)


def _row(row: Row, view: View, groups: list[Column], shades: dict[str, tuple[float, float]]) -> str:
    tokens = []
    for position, in_loss in enumerate(row.in_loss()):
        classes, style = ["t"], ""
        if row.input_ids[position] in view.special:
            classes.append("special")
        if in_loss:
            classes += ["in-loss", *_group_classes(row, position, groups)]
            style = _shade_style(row, position, shades)
        # Tab reaches the first token only, arrow keys the others
        focus = "0" if position == 0 else "-1"
        text = view.texts[row.input_ids[position]]
        tokens.append(f'<span class="{" ".join(classes)}" tabindex="{focus}"{style}>{_token_html(text)}</span>')
        if "\n" in text:
            tokens.append("<br>")
    counts = escape(" · ".join(row_counts(row, view.columns)))
    return (
        f'<section id="row-{row.number}"><h2>Row {row.number} <small>{counts}</small></h2>'
        f'<p class="tokens" dir="ltr">{"".join(tokens)}</p></section>\n'
    )


def _group_classes(row: Row, position: int, groups: list[Column]) -> list[str]:
    return [f"c{n}-{column.group_of(row.values[column.name][position])}" for n, column in enumerate(groups)]


def _shade_style(row: Row, position: int, shades: dict[str, tuple[float, float]]) -> str:
    parts = []
    for number, (name, (low, high)) in enumerate(shades.items()):
        value = row.values[name][position]
        share = (value - low) / (high - low) if high > low and math.isfinite(value) else 0
        parts.append(f"--s{number}:{share:.2f}")
    return f' style="{";".join(parts)}"' if parts else ""


def _token_html(text: str) -> str:
    return "".join(f"<i>{escape(piece)}</i>" if mark else escape(piece) for piece, mark in visible_pieces(text))


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
