"""Raw rows of the paper's data sets, from the Hub or elsewhere, as splits that can be trained on."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from paper_data import PAPER_DATA, Converted
from tqdm.auto import tqdm

from hf_sft_variants.errors import InputError, first_line
from hf_sft_variants.evaluation.answers import ANSWER_MARK


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


class PreparedSplit(NamedTuple):
    """The rows of a split, and how many were dropped for which reason."""

    rows: list[dict]
    dropped: Counter


def load_source(name: str, source: str | None = None, subset: str | None = None) -> dict[str, Dataset]:
    """
    Loads a data set of the paper from the Hub, or rows like its own from elsewhere.

    Args:
        name (`str`):
            One of `PAPER_DATA`.
        source (`str`, *optional*):
            Folder, file or another id on the Hub, by default the paper's.
        subset (`str`, *optional*):
            Subset ("config") of a data set on the Hub, by default the one that the paper's source needs.

    Returns:
        `dict[str, Dataset]`: The splits, with the columns that the rule reads.

    Raises:
        InputError: If the source cannot be loaded or lacks a column.
    """
    data = PAPER_DATA[name]
    file = Path(source) if source is not None and Path(source).is_file() else None
    if file is not None and file.suffix not in FILE_FORMATS:
        raise InputError(f"`--source` is {source!r}: pass a file that ends in {', '.join(FILE_FORMATS)}.")
    try:
        if file is not None:
            splits = load_dataset(FILE_FORMATS[file.suffix], data_files=source)
        elif source is not None:
            splits = load_dataset(source, subset)
        else:
            splits = load_dataset(data.source, subset or data.subset, revision=data.revision)
    except (DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"`--source` {source or data.source!r} could not be loaded ({first_line(error)}): pass a folder "
            "or a file with rows like those of the Hub, or another id on the Hub; `--subset` names a subset there."
        ) from error
    return {split: _with_columns(rows, data.columns, name, split) for split, rows in splits.items()}


def prepare_splits(
    name: str,
    splits: dict[str, Dataset],
    limit: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    with_completion: bool = False,
) -> dict[str, PreparedSplit]:
    """
    Turns raw rows into rows for [`~hf_sft_variants.SFTKeyTrainer`].

    A row has the conversation `prompt`, the question alone, and the strings `reasoning` and `answer`. Rows that lack
    one of the three, or that have one of the paper's tags in their reasoning or answer, are dropped and counted.

    Args:
        name (`str`):
            One of `PAPER_DATA`.
        splits (`dict[str, Dataset]`):
            Raw rows, as [`load_source`] returns them.
        limit (`int`, *optional*):
            Number of rows of each split, drawn at random. By default all, in the order of the source.
        test_size (`int`, *optional*):
            Number of rows of a split `"test"` that is drawn at random from `"train"`, for a source without one. It
            does not depend on `limit`, and what is left for training has none of its questions.
        seed (`int`, *optional*, defaults to `0`):
            Seed of what is drawn.
        with_completion (`bool`, *optional*, defaults to `False`):
            Whether to add the untagged response, reasoning and a line `#### answer`, as the conversation `completion`
            for plain SFT. [`~hf_sft_variants.SFTKeyTrainer`] replaces it where it tags `reasoning` and `answer`.

    Returns:
        `dict[str, PreparedSplit]`: The prepared splits.

    Raises:
        InputError: If an argument is out of range, a column has values of another kind, or no row is left.
    """
    _check_sizes(splits, limit, test_size, seed)
    drawn = None if limit is None and test_size is None else seed
    converted = {split: _convert(name, rows, split, drawn) for split, rows in splits.items()}
    held_out = {}
    if test_size is not None:
        held_out["test"] = test = _take(converted["train"], test_size)
        if len(test.rows) < test_size:
            raise InputError(f"`--test-size` is {test_size}, but {len(test.rows)} rows can be used: ask for fewer.")
        converted["train"] = _without_questions_of(test.rows, converted["train"])
    prepared = {split: _take(rows, limit) for split, rows in converted.items()} | held_out
    for split, (rows, dropped) in prepared.items():
        if not rows:
            reasons = "; ".join(f"{count} dropped: {reason}" for reason, count in dropped.most_common())
            raise InputError(f"Split {split!r} has no row that can be used as {name} ({reasons or 'it is empty'}).")
        if with_completion:
            rows[:] = map(_with_completion, rows)
    return prepared


def _convert(name: str, rows: Dataset, split: str, seed: int | None) -> Iterator[Converted]:
    """Every row by its rule, in the order of the source, or with a seed in random order."""
    order = list(range(len(rows)))
    if seed is not None:
        random.Random(seed).shuffle(order)
        rows = rows.select(order)
    # disable=None: no bar where the output is not a terminal
    for i, row in zip(order, tqdm(rows, desc=f"Preparing {split}", unit=" rows", disable=None), strict=True):
        try:
            yield PAPER_DATA[name].convert(row)
        except InputError as error:
            raise InputError(f"Row {i} of split {split!r}: {error}") from error


def _take(converted: Iterable[Converted], limit: int | None) -> PreparedSplit:
    rows, dropped = [], Counter()
    for row, reason in converted:
        if row is None:
            dropped[reason] += 1
            continue
        rows.append(row)
        if len(rows) == limit:
            break
    return PreparedSplit(rows, dropped)


def _without_questions_of(test: list[dict], converted: Iterable[Converted]) -> Iterator[Converted]:
    questions = {row["prompt"][0]["content"] for row in test}
    for row, reason in converted:
        seen = row is not None and row["prompt"][0]["content"] in questions
        yield Converted(None, "its question is in the test split") if seen else Converted(row, reason)


def _with_completion(row: dict) -> dict:
    content = f"{row['reasoning']}\n{ANSWER_MARK} {row['answer']}"
    return {**row, "completion": [{"role": "assistant", "content": content}]}


def _with_columns(rows: Dataset, columns: tuple[str, ...], name: str, split: str) -> Dataset:
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise InputError(
            f"Split {split!r} of `--source` has no column {', '.join(map(repr, missing))}, only "
            f"{', '.join(map(repr, rows.column_names))}: rows of {name} have {', '.join(map(repr, columns))}."
        )
    return rows.select_columns(list(columns))


def _check_sizes(splits: dict[str, Dataset], limit: int | None, test_size: int | None, seed: int) -> None:
    for option, value, smallest in (("--limit", limit, 1), ("--test-size", test_size, 1), ("--seed", seed, 0)):
        if value is not None and value < smallest:
            raise InputError(f"`{option}` is {value}: pass an integer of at least {smallest}.")
    if test_size is not None and ("test" in splits or "train" not in splits):
        raise InputError(
            f"`--test-size` is {test_size}, which makes a split 'test' of rows of 'train', but the source has "
            f"{', '.join(map(repr, splits))}: leave it out."
        )
