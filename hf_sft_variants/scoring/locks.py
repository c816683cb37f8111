"""Lets one of several runs that need the same scores compute them while the others wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from accelerate.logging import get_logger
from filelock import FileLock, Timeout

from ..base.processes import on_main_process
from .shards import writing_to


logger = get_logger(__name__)

# Duration of one attempt: meanwhile the other processes wait in a collective, which times out
LOCK_SECONDS = 5.0


@contextmanager
def lock_of_folder(folder: Path) -> Iterator[None]:
    """
    Hold the lock of a folder of scores, waiting until no other run holds it. Must be entered by all processes at once.
    """
    lock = FileLock(folder / ".lock")
    is_waiting = False
    while not on_main_process(partial(_try_to_lock, lock, folder)):
        if not is_waiting:
            logger.warning(
                f"Waiting for another run that makes scores in {folder} and holds {lock.lock_file}. To go on now, "
                "stop that run, or set `score_cache_dir` to another folder."
            )
        is_waiting = True
    try:
        yield
    finally:
        lock.release()  # the file stays: others may be waiting for it


def _try_to_lock(lock: FileLock, folder: Path) -> bool:
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            return False
    return True
