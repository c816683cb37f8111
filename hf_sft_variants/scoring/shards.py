"""Scores of a data set on disk: computed in shards that are fixed beforehand, kept in one Parquet file."""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from filelock import FileLock
from tqdm.auto import tqdm

from ..base.example_keys import EXAMPLE_KEY
from ..errors import InputError


# What a killed run loses at most, and what several processes take turns in
BATCHES_PER_SHARD = 16

_METADATA_KEY = b"hf_sft_variants"
_ROW = "row"


def scores_path(cache_dir: str | Path, settings: dict, dataset: Dataset) -> Path:
    """
    Where the scores of these examples under these settings are kept: another model, option, row or truncation, another
    file. The order of the rows makes no difference.

    Args:
        cache_dir (`str` or `Path`):
            Folder of all scores.
        settings (`dict`):
            All that the scores depend on beside the examples, as JSON values.
        dataset ([`~datasets.Dataset`]):
            Examples with `example_key`, `input_ids` and `labels`.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    # The keys name whole examples; what truncation left of them belongs to it
    for key, content in sorted(zip(dataset[EXAMPLE_KEY], map(_digest, dataset), strict=True)):
        digest.update(f"{key} {content} ".encode())
    return Path(cache_dir) / f"{digest.hexdigest()[:24]}.parquet"


def _digest(example: dict) -> str:
    tokens = np.array([example["input_ids"], example["labels"]], dtype=np.int64)
    return hashlib.sha256(tokens.tobytes()).hexdigest()


def score_in_shards(
    dataset: Dataset,
    score_batch: Callable[[list[dict]], list[dict]],
    path: Path,
    settings: dict,
    batch_tokens: int,
    description: str,
) -> pa.Table:
    """
    Score every example and write one Parquet file with a row for each, in the data set's order.

    The work is cut into shards before it begins, so what is scored together does not depend on the number of
    processes or on interruptions. Processes take shards in turns; each finished shard is on disk, and a run that was
    killed goes on where it stopped. To be called by all processes at once.

    Args:
        dataset ([`~datasets.Dataset`]):
            Examples with `example_key` and `input_ids`.
        score_batch (`Callable`):
            Scores a list of examples of similar length: a dictionary of columns for each.
        path (`Path`):
            File to write, in a folder that all processes share. Unfinished shards are beside it, in `<path>.shards-*`.
        settings (`dict`):
            All that the scores depend on, written into the file.
        batch_tokens (`int`):
            Most tokens of a batch, padding included; a longer example is a batch by itself.
        description (`str`):
            Text before the progress bar.

    Returns:
        `pa.Table`: The file's content.

    Raises:
        `InputError`: If the scores can't be written; what was scored so far is kept.
    """
    state = PartialState()
    lock = FileLock(f"{path}.lock")  # another run that needs the same scores waits for this one
    if state.is_main_process:
        with _writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    state.wait_for_everyone()
    try:
        if not path.is_file():
            _score_missing_shards(dataset, score_batch, path, settings, batch_tokens, description)
    finally:
        if state.is_main_process:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
    return read_scores(path, settings)


def _score_missing_shards(dataset, score_batch, path, settings, batch_tokens, description) -> None:
    state = PartialState()
    # Another order of the rows or another budget cuts other shards: a run that goes on so begins anew
    order = hashlib.sha256(f"{list(dataset[EXAMPLE_KEY])} {batch_tokens} {BATCHES_PER_SHARD}".encode())
    folder = path.with_name(f"{path.name}.shards-{order.hexdigest()[:8]}")
    lengths = [len(ids) for ids in dataset["input_ids"]]
    shards = plan_shards(lengths, batch_tokens)
    names = [folder / f"{number:05d}.parquet" for number in range(len(shards))]
    mine = range(state.process_index, len(shards), state.num_processes)
    missing = [number for number in mine if not names[number].is_file()]
    total = sum(lengths[row] for number in missing for batch in shards[number] for row in batch)
    with tqdm(total=total, desc=description, unit=" tokens", disable=not state.is_main_process) as progress:
        for number in missing:
            _score_shard(dataset, shards[number], score_batch, names[number], progress)
    state.wait_for_everyone()
    if state.is_main_process:
        _merge_shards(names, dataset, path, settings)
        for left_over in path.parent.glob(f"{path.name}.shards-*"):
            shutil.rmtree(left_over)
    state.wait_for_everyone()


def plan_shards(lengths: Sequence[int], batch_tokens: int) -> list[list[list[int]]]:
    """
    Cut rows into batches of similar length, the longest first, and batches into shards.

    Args:
        lengths (`Sequence[int]`):
            Number of tokens of each row.
        batch_tokens (`int`):
            Most tokens of a batch when its rows are padded to the longest.

    Returns:
        `list[list[list[int]]]`: Shards of batches of row numbers.
    """
    batches, width = [], 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not batches or width * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            width = max(lengths[row], 1)
        batches[-1].append(row)
    return [batches[start : start + BATCHES_PER_SHARD] for start in range(0, len(batches), BATCHES_PER_SHARD)]


def _score_shard(dataset, batches, score_batch, name: Path, progress) -> None:
    results = []
    for batch in batches:
        examples = [dataset[row] for row in batch]
        for row, scores in zip(batch, score_batch(examples), strict=True):
            results.append({_ROW: row, **scores})
        progress.update(sum(len(example["input_ids"]) for example in examples))
    write_parquet(pa.Table.from_pylist(results), name)


def _merge_shards(names: list[Path], dataset: Dataset, path: Path, settings: dict) -> None:
    table = pa.concat_tables(map(_read_shard, names), promote_options="permissive").sort_by(_ROW)
    table = table.drop_columns(_ROW).add_column(0, EXAMPLE_KEY, pa.array(dataset[EXAMPLE_KEY], pa.string()))
    write_parquet(table.replace_schema_metadata({_METADATA_KEY: json.dumps(settings)}), path)


def _read_shard(name: Path) -> pa.Table:
    try:
        return pq.read_table(name)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{name}, a part of the scores, can't be read ({error}). Delete the file and start again."
        ) from error


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.{PartialState().process_index}.partial")
    try:
        with _writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, partial)
    except InputError:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


@contextmanager
def _writing_to(folder: Path):
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise InputError(
            f"Scores can't be written to {folder}: {reason}. Make room or check the folder and start again, what is "
            "scored so far is kept; or set `score_cache_dir` to another folder.",
        ) from error


def find_scores(path: Path, settings: dict) -> pa.Table | None:
    """
    Read what [`score_in_shards`] wrote, or say that it has to be called: by all processes, or by none.

    Raises:
        `InputError`: As [`read_scores`].
    """
    return read_scores(path, settings) if all(gather_object([path.is_file()])) else None


def read_scores(path: Path, settings: dict) -> pa.Table:
    """
    Read what [`score_in_shards`] wrote.

    Raises:
        `InputError`: If the file can't be read or was written with other settings, naming those that differ.
    """
    try:
        table = pq.read_table(path)
        written = json.loads((table.schema.metadata or {})[_METADATA_KEY])
        written = dict(written)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"The scores in {path} can't be read ({error!r}). Delete the file to score again.") from error
    if written != settings:
        names = sorted(name for name in {*written, *settings} if written.get(name) != settings.get(name))
        differences = "; ".join(f"{name} was {written.get(name)!r}, is {settings.get(name)!r}" for name in names)
        raise InputError(
            f"The scores in {path} were written with other options: {differences}. Delete the file to score again."
        )
    return table


def join_scores(dataset: Dataset, scores: pa.Table, columns: dict[str, str], source: str) -> Dataset:
    """
    Add columns of scores to the examples with the same key, whatever the order of the two.

    Args:
        dataset ([`~datasets.Dataset`]):
            Examples with `example_key`.
        scores (`pa.Table`):
            Scores with `example_key`.
        columns (`dict[str, str]`):
            Column of the scores to the name it gets in the data set.
        source (`str`):
            Where the scores come from, for the error.

    Raises:
        `InputError`: If an example has no scores, naming it.
    """
    row_of_key = {key: row for row, key in enumerate(scores[EXAMPLE_KEY].to_pylist())}
    rows = []
    for number, key in enumerate(dataset[EXAMPLE_KEY]):
        if key not in row_of_key:
            raise InputError(
                f"Row {number} of the data set (key {key}) has no scores in {source}. Score the data set again."
            )
        rows.append(row_of_key[key])
    taken = scores.select(list(columns)).take(rows)
    for column, name in columns.items():
        if name in dataset.column_names:  # the user's file stays as it is
            dataset = dataset.remove_columns(name)
        dataset = dataset.add_column(name, taken[column])
    return dataset
