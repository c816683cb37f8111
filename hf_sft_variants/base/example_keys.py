"""Keys by which scores find their examples again, whatever was filtered, shuffled or packed in between."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from datasets import Dataset


EXAMPLE_KEY = "example_key"


def add_example_keys(dataset: Dataset, columns: Sequence[str], num_proc: int | None = None) -> Dataset:
    """
    Add the column `example_key`: a hash of the row's content and the number of the same rows before it.

    Equal rows are common, so the hash alone would not name a row: the third of three equal rows has the key
    `"<hash>-2"`. Call this before anything is filtered, shuffled or packed.

    Args:
        dataset ([`~datasets.Dataset`]):
            Data set to give keys to.
        columns (`Sequence[str]`):
            Columns that are the row's content. Their values must be what JSON can hold.
        num_proc (`int`, *optional*):
            Number of processes.
    """
    hashed = dataset.map(
        _hash_content, fn_kwargs={"columns": list(columns)}, num_proc=num_proc, desc="Hashing examples"
    )
    seen = Counter()
    keys = []
    for content_hash in hashed[EXAMPLE_KEY]:
        keys.append(f"{content_hash}-{seen[content_hash]}")
        seen[content_hash] += 1
    # The fingerprint follows from the hashed data set's: a second start finds everything after this in the cache
    return hashed.remove_columns(EXAMPLE_KEY).add_column(
        EXAMPLE_KEY, keys, new_fingerprint=hashlib.sha256(f"keys {hashed._fingerprint}".encode()).hexdigest()[:16]
    )


def _hash_content(example: dict, columns: list[str]) -> dict[str, str]:
    # A field that only other rows have is null in this one
    content = json.dumps([_without_nulls(example[column]) for column in columns], ensure_ascii=False, sort_keys=True)
    return {EXAMPLE_KEY: hashlib.sha256(content.encode()).hexdigest()[:32]}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
