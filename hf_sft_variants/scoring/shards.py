"""
Scores on disk: small Parquet files whose rows are found by key. Each holds a shard, the unit of work. The key is the
hash of an example's tokens and labels, not that of `base/example_keys.py`.
"""

import errno
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..base.example_keys import EXAMPLE_KEY
from ..errors import InputError
from ..files import atomic_write


# A process scores this many batches before it writes them; a crash loses no more
BATCHES_PER_SHARD = 16

_METADATA_KEY = b"hf_sft_variants"


def plan_shards(lengths: Sequence[int], batch_tokens: int) -> list[list[list[int]]]:
    """
    Group row numbers into batches of similar length, the longest first, and batches into shards. A batch has at most
    `batch_tokens` tokens, padding included; a longer row is a batch of its own.
    """
    batches: list[list[int]] = []
    width = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not batches or width * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            width = max(lengths[row], 1)
        batches[-1].append(row)
    return [batches[start : start + BATCHES_PER_SHARD] for start in range(0, len(batches), BATCHES_PER_SHARD)]


def settings_folder(cache_dir: str | Path, settings: dict) -> Path:
    """Folder of all scores made with these settings, whatever the data."""
    return Path(cache_dir) / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def read_scores(folder: Path, settings: dict, keys: Collection[str]) -> pa.Table:
    """
    Read the rows of a folder that have one of the keys. Raises an `InputError` if a file can't be read or was written
    with other settings.
    """
    tables = [_read_file(path, settings, keys) for path in sorted(folder.glob("*.parquet"))]
    return concat_scores([pa.table({EXAMPLE_KEY: pa.array([], pa.string())}), *tables])


def concat_scores(tables: list[pa.Table]) -> pa.Table:
    """Concatenate tables of scores; a missing column is filled with nulls."""
    return pa.concat_tables(tables, promote_options="permissive").replace_schema_metadata(None)


def _read_file(path: Path, settings: dict, keys: Collection[str]) -> pa.Table:
    try:
        file = pq.ParquetFile(path)
        written = dict(json.loads((file.schema_arrow.metadata or {})[_METADATA_KEY]))
        is_wanted = [key in keys for key in file.read([EXAMPLE_KEY])[EXAMPLE_KEY].to_pylist()]
        table = file.read().filter(is_wanted) if any(is_wanted) else file.schema_arrow.empty_table()
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"The scores in {path} can't be read ({error!r}). Delete the file to score again.") from error
    if written != settings:
        names = sorted(name for name in {*written, *settings} if written.get(name) != settings.get(name))
        differences = "; ".join(f"{name} was {written.get(name)!r}, is now {settings.get(name)!r}" for name in names)
        raise InputError(
            f"The scores in {path} were written with other options: {differences}. Delete the file to score again."
        )
    return table


def write_scores(table: pa.Table, folder: Path, settings: dict) -> None:
    """Add rows to a folder, in a file named after their keys; if it exists, nothing is written."""
    name = hashlib.sha256(" ".join(table[EXAMPLE_KEY].to_pylist()).encode()).hexdigest()[:24]
    path = folder / f"{name}.parquet"
    if not path.is_file():
        write_parquet(table.replace_schema_metadata({_METADATA_KEY: json.dumps(settings)}), path)


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a Parquet file atomically."""
    with writing_to(path.parent), atomic_write(path) as partial:
        pq.write_table(table, partial)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Convert an `OSError` inside the block to an `InputError` that says why scores can't be written."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise InputError(
            f"Scores can't be written to {folder}: {reason}. Free some space or check the folder, then start again "
            "(finished scores are kept), or set `score_cache_dir` to another folder.",
        ) from error
