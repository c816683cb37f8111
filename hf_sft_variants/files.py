"""Writing files so that a process that is killed leaves the old file or the new one, never a part."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """
    Yields a temporary path next to `path`, which becomes `path` once the block has succeeded. Its folder is made if
    it is missing.

    Several processes may write the same file at once: the last one wins. For files of our own making: what a user
    names may be a link, a pipe or a device, and is written in place.

    Example:

    ```python
    with atomic_write("results.json") as partial:
        partial.write_text("{}", encoding="utf-8")
    ```
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file with [`atomic_write`]."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
