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
    brackets: `[token]` in the loss, `[token/1]` in group 1, `[token=0.5]` with its score, `(token)` not in the loss.
    """
    groups = next((column for column in view.columns if column.is_group), None)
    scores = [column for column in view.columns if column.is_score]
    lines = [view.title() + ". " + _key(groups, scores, styled)]
    words = reading(view)
    if words:
        lines += ["", words]
    for row in view.rows:
        lines += [
            "",
            f"row {row.number}: {', '.join(row_counts(row, view.columns))}",
            _tokens(row, view, groups, scores, styled),
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


def _key(groups: Column | None, scores: list[Column], styled: bool) -> str:
    if styled:
        names = [_styled(name, value, "") for value, name in groups.names.items()] if groups else []
        key = f"{_DIM}not in the loss{_RESET}, {', '.join(['in the loss', *names])}"
    else:
        key = "(token) is not in the loss, [token] is" + (f", [token/1] with its {groups.name}" if groups else "")
    if scores:
        key += f", token=number with its {' and '.join(column.name for column in scores)}"
    return key + ("" if styled else ".")


def _tokens(row: Row, view: View, groups: Column | None, scores: list[Column], styled: bool) -> str:
    pieces = []
    for position, (token_id, in_loss) in enumerate(zip(row.input_ids, row.in_loss(), strict=True)):
        text = view.texts[token_id]
        if in_loss:
            group = groups.group_of(row.values[groups.name][position]) if groups else -1
            numbers = ",".join(f"{row.values[column.name][position]:.2g}" for column in scores)
            mark = _styled if styled else _bracketed
            pieces.append(mark(visible_text(text), group, f"={numbers}" if scores else ""))
        else:
            pieces.append(f"{_DIM}{visible_text(text)}{_RESET}" if styled else f"({visible_text(text)})")
        if "\n" in text:
            pieces.append("\n")
    return "".join(pieces).rstrip("\n")


def _bracketed(text: str, group: int, score: str) -> str:
    return f"[{text}{score}]" if group < 0 else f"[{text}/{group}{score}]"


def _styled(text: str, group: int, score: str) -> str:
    dim_score = f"{_DIM}{score}{_RESET}" if score else ""
    if group < 0:
        return text + dim_score
    weight = _BOLD_UNDERLINED if group == 1 else ""
    return f"{weight}\x1b[{_GROUP_COLOURS[group % len(_GROUP_COLOURS)]}m{text}{_RESET}{dim_score}"
