"""Fingerprints of files, model folders and tokenizers, by their content alone and not by path or time of change."""

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase


# Files of a model's folder that its output depends on
_MODEL_FILES = {".bin", ".jinja", ".json", ".model", ".py", ".safetensors", ".txt"}

# In configurations: where the model, or an adapter's base model, was loaded from
_LOCATIONS = ("_name_or_path", "base_model_name_or_path")

# Larger files are sampled: hashing a model of 16 GB takes as long as loading it
_WHOLE, _BLOCK, _NUM_BLOCKS = 2**24, 2**12, 256


def fingerprint(path: str | os.PathLike) -> str:
    """
    Hash the content of a file or folder to 16 hexadecimal digits: equal for copies, different after a change.

    In a folder, only a model's files count, without subfolders. Files up to 16 MiB are read whole. Of a larger one the
    size and samples are hashed: of a safetensors file the header and the start, the middle and the end of each tensor,
    of any other file 256 blocks.
    """
    path = Path(path)
    if not path.is_dir():
        return _of_file(path)
    files = sorted(file for file in path.iterdir() if file.suffix in _MODEL_FILES and file.is_file())
    return _digest(f"{file.name} {_of_file(file)}".encode() for file in files)


def describe_content(path: str | os.PathLike) -> dict[str, str]:
    """Describe a file or folder by its name, for readers, and its [`fingerprint`], the only part that is compared."""
    return {"name": Path(path).resolve().name, "content": fingerprint(path)}


def what_counts(value: Any) -> Any:
    """JSON values as they are compared: without the names of what [`describe_content`] describes."""
    if isinstance(value, list):
        return [what_counts(item) for item in value]
    is_description = isinstance(value, dict) and value.keys() == {"name", "content"}
    return value["content"] if is_description else value


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a tokenizer's tokens and their ids."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()


def _of_file(path: Path) -> str:
    status = path.stat()
    return _of_content(str(path.resolve()), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _of_content(path: str, size: int, modified: int) -> str:
    """Hash a file. `modified` only keeps the cache from returning the hash of an older version."""
    if size > _WHOLE:
        with open(path, "rb") as file:
            return _digest([str(size).encode(), *_samples(file, size, path.endswith(".safetensors"))])
    content = Path(path).read_bytes()
    if path.endswith(".json"):
        content = _without_locations(content)
    return _digest([content])


def _samples(file, size: int, has_tensors: bool):
    offsets = [size * number // _NUM_BLOCKS for number in range(_NUM_BLOCKS)]
    if has_tensors:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        yield header
        ends = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        starts = [8 + length + offset for start, end in ends for offset in (start, (start + end) // 2, end - _BLOCK)]
        offsets = sorted({max(start, 8 + length) for start in starts})
    for offset in [*offsets, max(size - _BLOCK, 0)]:
        file.seek(offset)
        yield file.read(_BLOCK)


def _without_locations(content: bytes) -> bytes:
    try:
        values = json.loads(content)
    except ValueError:
        return content
    if isinstance(values, dict) and any(name in values for name in _LOCATIONS):
        values = {name: value for name, value in values.items() if name not in _LOCATIONS}
        return json.dumps(values, sort_keys=True).encode()
    return content


def _digest(parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
