"""Rows of a prepared data set, and the meaning of its per-token columns."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import accumulate, islice, pairwise
from typing import Any

from datasets import IterableDataset
from trl import SFTTrainer

from ..errors import InputError
from ..text.special_tokens import special_token_ids
from .token_text import token_texts


# An integer column with more values than this is not a grouping
MAX_GROUPS = 32


@dataclass
class Column:
    """
    A column with one number per token. `kind` is `"group"` (integers, negative ones are no group), `"mask"` (0 or 1),
    `"score"` (floats) or `"number"` (other integers). With `per_example`, each row has a single value, repeated for
    its tokens. `names` has the names of the groups, or of a mask's 1.
    """

    name: str
    kind: str
    per_example: bool = False
    names: dict[int, str] = field(default_factory=dict)

    @property
    def is_group(self) -> bool:
        """Whether the column marks tokens: groups and masks do."""
        return self.kind in ("group", "mask")

    @property
    def is_score(self) -> bool:
        """Whether the column shades tokens."""
        return self.kind == "score" and not self.per_example

    def group_of(self, value: int) -> int:
        """Group of a value, -1 for none: a mask's 0, and negative ids."""
        return int(value) if value in self.names else -1


@dataclass
class Row:
    """
    One example of the prepared data set, at the position `number`, or a packed row of several. A token with the label
    -100 is not supervised. `values` has the values of each per-token column, `lengths` the number of tokens of each
    example.
    """

    number: int
    input_ids: list[int]
    labels: list[int]
    values: dict[str, list]
    lengths: list[int]

    def in_loss(self) -> list[bool]:
        """Whether each token is in the loss; nothing predicts the first of an example."""
        starts = set(accumulate(self.lengths, initial=0))
        return [position not in starts and label != -100 for position, label in enumerate(self.labels)]

    def examples(self) -> list[dict[str, list[int]]]:
        """Tokens and labels of each example in the row."""
        ends = [
            min(end, len(self.input_ids)) for end in accumulate(self.lengths, initial=0)
        ]  # truncation may have cut the last
        slices = [slice(start, end) for start, end in pairwise(ends) if start < end]
        return [{"input_ids": self.input_ids[part], "labels": self.labels[part]} for part in slices]

    def values_in_loss(self, column: Column) -> list:
        """Values of the tokens in the loss, or the row's single value."""
        values = self.values[column.name]
        if column.per_example:
            return values[:1]
        return [value for value, in_loss in zip(values, self.in_loss(), strict=True) if in_loss]

    def group_counts(self, column: Column) -> Counter[int]:
        """Number of tokens in the loss by group."""
        return Counter(map(column.group_of, self.values_in_loss(column)))


@dataclass
class View:
    """
    The rows to show, with their per-token columns. `num_rows` is the length of the whole prepared data set, `None` for
    a stream. `texts` has the text of each token id in the rows, `special` the ids of special tokens.
    """

    rows: list[Row]
    columns: list[Column]
    num_rows: int | None
    texts: dict[int, str]
    special: set[int]

    def title(self) -> str:
        first, last = self.rows[0].number, self.rows[-1].number
        of_all = "a stream" if self.num_rows is None else f"{self.num_rows:,}"
        return f"row {first} of {of_all}" if first == last else f"rows {first} to {last} of {of_all}"


def parse_range(text: str) -> slice:
    """
    Read a range of rows as in Python: `0:20`, `:5`, `10:`, `:`, or a single number. Raises an `InputError` if the text
    is not a range, or an empty one.
    """
    match = re.fullmatch(r"(\d*)(:(\d*))?", text)
    if not match or not text:
        raise InputError(f"`--rows` must be a range such as 0:20 or 100:, or a row's number, got {text!r}.")
    start = int(match[1] or 0)
    stop = start + 1 if match[2] is None else int(match[3]) if match[3] else None
    if stop is not None and stop <= start:
        raise InputError(f"`--rows` must end after its start (the end is exclusive), got {text!r}.")
    return slice(start, stop)


def read_view(trainer: SFTTrainer, wanted: slice) -> View:
    """
    Read rows of a trainer's prepared training set, with every column that has one number per token. The trainer's
    `annotation_columns` give the value that means "none" in a column and, where that is a member of an `IntEnum`, the
    names of the others. Raises an `InputError` if there are no such rows, or they have no tokens.
    """
    dataset = trainer.train_dataset
    is_stream = isinstance(dataset, IterableDataset)
    num_rows = None if is_stream else len(dataset)
    examples = list(
        islice(dataset, wanted.start, wanted.stop) if is_stream else map(dataset.__getitem__, range(num_rows)[wanted])
    )
    if not examples:
        there_are = "no more" if is_stream else num_rows
        raise InputError(f"`--rows` starts at row {wanted.start}, but the prepared data set has {there_are} rows.")
    if "input_ids" not in examples[0] or "labels" not in examples[0]:
        raise InputError("The prepared data set has no `input_ids` and `labels`: the collator makes its tokens.")
    columns = _find_columns(examples, trainer)
    rows = [
        Row(
            number,
            example["input_ids"],
            example["labels"],
            {column.name: example[column.name] for column in columns},
            example.get("seq_lengths") or [len(example["input_ids"])],
        )
        for number, example in enumerate(examples, wanted.start)
    ]
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    ids = {token_id for row in rows for token_id in (*row.input_ids, *row.labels) if token_id != -100}
    return View(rows, columns, num_rows, token_texts(tokenizer, ids), special_token_ids(tokenizer))


def _find_columns(examples: list[dict[str, Any]], trainer: SFTTrainer) -> list[Column]:
    """The method's columns come first; a column that equals an earlier one (a copy of the user's) is left out."""
    padding_values = getattr(trainer, "annotation_columns", {})
    columns, seen = [], []
    for name in dict.fromkeys([*padding_values, *examples[0]]):
        rows = [example.get(name) for example in examples]
        if name in ("input_ids", "labels") or rows in seen or not _is_per_token(rows, examples):
            continue
        seen.append(rows)
        columns.append(_describe(name, rows, padding_values.get(name, 0)))
    return columns


def _is_per_token(rows: Iterable[Any], examples: list[dict[str, Any]]) -> bool:
    return all(
        isinstance(values, list)
        and len(values) == len(example["input_ids"])
        and all(isinstance(value, int | float) for value in values)
        for values, example in zip(rows, examples, strict=True)
    )


def _describe(name: str, rows: list[list], padding_value: float) -> Column:
    values = {value for row in rows for value in row}
    is_score = any(isinstance(value, float) for value in values)
    members = type(padding_value) if isinstance(padding_value, IntEnum) else ()
    group_names = {member.value: member.name.lower().replace("_", " ") for member in members}
    groups = sorted((value for value in values if value >= 0), reverse=True)
    if all(len(set(row)) == 1 for row in rows):
        return Column(name, "score" if is_score else "number", per_example=True)
    if is_score:
        return Column(name, "score")
    if values <= {0, 1} and padding_value == 0:
        return Column(name, "mask", names={1: group_names.get(1, name)})
    if len(groups) > MAX_GROUPS:
        return Column(name, "number")
    return Column(name, "group", names={group: group_names.get(group, f"group {group}") for group in groups})
