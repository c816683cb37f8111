"""Rows as text, for a terminal or a file."""

from .probabilities import reading
from .rows import Column, Row, View
from .token_text import visible_text


_RESET, _BOLD_UNDERLINED, _DIM = "\x1b[0m", "\x1b[1;4m", "\x1b[2m"
# Cyan, magenta, green, yellow, blue
_GROUP_COLOURS = (36, 35, 32, 33, 34)


def render_text(view: View, styled: bool) -> str:
    """
    Render the rows, each with its counts and tokens. Tokens are styled with ANSI escapes, for a terminal, or put in
    brackets: `[token]` in the loss, `[token/1]` in group 1, `(token)` not in the loss.
    """
    groups = next((column for column in view.columns if column.is_group), None)
    lines = [view.title() + ". " + _key(groups, styled)]
    words = reading(view)
    if words:
        lines += ["", words]
    for row in view.rows:
        lines += [
            "",
            f"row {row.number}: {', '.join(row_counts(row, view.columns))}",
            _tokens(row, view, groups, styled),
        ]
    return "\n".join(lines) + "\n"


def row_counts(row: Row, columns: list[Column]) -> list[str]:
    """Numbers of tokens, of tokens in the loss and of each group, and the row's single values."""
    counts = [f"{len(row.input_ids)} tokens", f"{sum(row.in_loss())} in the loss"]
    for column in columns:
        if column.per_example:
            value = row.values[column.name][0]
            counts.append(f"{column.name}: {value:.4g}" if column.kind == "score" else f"{column.name}: {value}")
        elif column.is_group:
            group_counts = row.group_counts(column)
            counts += [f"{name}: {group_counts[group]}" for group, name in column.names.items() if group_counts[group]]
    return counts


def _key(groups: Column | None, styled: bool) -> str:
    if not styled:
        group = f", [token/1] with its {groups.name}" if groups else ""
        return f"(token) is not in the loss, [token] is{group}."
    names = [_styled(name, value) for value, name in groups.names.items()] if groups else []
    return f"{_DIM}not in the loss{_RESET}, {', '.join(['in the loss', *names])}"


def _tokens(row: Row, view: View, groups: Column | None, styled: bool) -> str:
    values = row.values[groups.name] if groups else [-1] * len(row.input_ids)
    pieces = []
    for token_id, in_loss, value in zip(row.input_ids, row.in_loss(), values, strict=True):
        text, group = view.texts[token_id], groups.group_of(value) if groups else -1
        pieces.append((_styled if styled else _bracketed)(visible_text(text), group, in_loss))
        if "\n" in text:
            pieces.append("\n")
    return "".join(pieces).rstrip("\n")


def _bracketed(text: str, group: int, in_loss: bool) -> str:
    if not in_loss:
        return f"({text})"
    return f"[{text}]" if group < 0 else f"[{text}/{group}]"


def _styled(text: str, group: int, in_loss: bool = True) -> str:
    if not in_loss:
        return f"{_DIM}{text}{_RESET}"
    if group < 0:
        return text
    weight = _BOLD_UNDERLINED if group == 1 else ""
    return f"{weight}\x1b[{_GROUP_COLOURS[group % len(_GROUP_COLOURS)]}m{text}{_RESET}"
