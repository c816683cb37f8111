"""Scores a data set with all processes together, reading cached scores from disk and caching new ones."""

import hashlib
import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.utils import gather_object, release_memory
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm

from ..base.example_keys import EXAMPLE_KEY
from ..errors import InputError
from .joins import rows_of_keys
from .locks import lock_of_folder
from .shards import concat_scores, plan_shards, read_scores, settings_folder, write_scores


Scorer = Callable[[list[dict]], list[dict]]

# Number of cached scores that are exchanged at a time
_ROWS_PER_ROUND = 1000


def cached_scores(
    dataset: Dataset,
    load_scorer: Callable[[], Scorer],
    cache_dir: str | Path | None,
    settings: dict,
    batch_tokens: int,
    description: str,
    max_tokens: int | None = None,
) -> pa.Table:
    """
    Read the scores of a data set from disk; compute and save the missing ones. Must be called by all processes.

    Scores are keyed by an example's `input_ids` and `labels`: equal examples are scored only once, and their scores
    are reused in any data set, order or batch. The processes share the work in shards, and each shard is written to
    disk as soon as it is finished, so a killed run resumes where it stopped. The processes need not share a file
    system: every machine keeps a copy.

    `load_scorer` loads the model and returns a function from examples to dictionaries with their scores; it is called
    only if scores are missing and no other run is computing them. `cache_dir`, by default `hf_sft_variants/scores` in
    the Hugging Face home folder, has a subfolder for each `settings`: everything else that the scores depend on, as
    JSON values. A batch has at most `batch_tokens` tokens, padding included; a longer example is scored alone.

    Returns the scorer's columns in the order of the data set, null for an example that has nothing to score or more
    than `max_tokens` tokens. Raises an `InputError` if scores can't be read or written (finished shards are kept), if
    no example can be scored, or if the processes have different examples or settings.
    """
    folder = settings_folder(cache_dir or Path(HF_HOME) / "hf_sft_variants" / "scores", settings)
    dataset = dataset.with_format(None).select_columns(["input_ids", "labels"])
    keys = token_keys(dataset, max_tokens)
    row_of_key = {key: row for row, key in enumerate(keys) if key is not None}
    if not row_of_key:
        at_most = "" if max_tokens is None else f" and at most {max_tokens} tokens"
        raise InputError(
            f"{description}: no example has a supervised token{at_most}. Check the labels, raise `max_length`, or "
            "choose a model that can read more tokens."
        )
    examples, wanted = dataset.select(row_of_key.values()), list(row_of_key)
    _require_same_on_all_processes({**settings, "examples": hashlib.sha256(" ".join(wanted).encode()).hexdigest()})
    scores, holders = _look_up(folder, settings, wanted)
    if not holders.all():
        with lock_of_folder(folder):
            found, holders = _look_up(folder, settings, wanted)
            tables = [found]
            for part in chain(
                _parts_to_send(wanted, found, holders),
                _parts_to_score(examples, wanted, load_scorer, holders, batch_tokens, description),
            ):
                tables.append(concat_scores(gather_object([part])))
                _keep(tables[-1], found[EXAMPLE_KEY], folder, settings)
            scores = concat_scores(tables)
    return scores.drop_columns(EXAMPLE_KEY).take(rows_of_keys(keys, scores))


def token_keys(dataset: Dataset, max_tokens: int | None = None) -> list[str | None]:
    """Hash each example's tokens and labels; `None` for an example that is too long or has nothing to score."""
    keys = []
    for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=1000):
        for input_ids, labels in zip(batch["input_ids"].to_numpy(), batch["labels"].to_numpy(), strict=True):
            # Nothing predicts the first token
            is_scored = (max_tokens is None or len(input_ids) <= max_tokens) and (labels[1:] != -100).any()
            content = np.concatenate([input_ids, labels], dtype=np.int64).tobytes()
            keys.append(hashlib.sha256(content).hexdigest()[:32] if is_scored else None)
    return keys


def _require_same_on_all_processes(values: dict) -> None:
    everywhere = gather_object([values])
    for process, others in enumerate(everywhere):
        for name in (name for name in values if others.get(name) != everywhere[0].get(name)):
            raise InputError(
                f"Process {process} disagrees with the main process on `{name}`: {others.get(name)!r}, not "
                f"{everywhere[0].get(name)!r}. Give all machines the same options, and copies of the same models and "
                "data."
            )


def _look_up(folder: Path, settings: dict, keys: list[str]) -> tuple[pa.Table, np.ndarray]:
    """Return the scores that this process finds, and whether each process (row) finds each key (column)."""
    scores, problem = None, None
    try:
        scores = read_scores(folder, settings, set(keys))
    except InputError as error:
        problem = error
    found = set() if scores is None else set(scores[EXAMPLE_KEY].to_pylist())
    everywhere = gather_object([(np.packbits([key in found for key in keys]), problem)])
    for _, problem in everywhere:
        if problem is not None:
            raise problem
    return scores, np.array([np.unpackbits(bits, count=len(keys)) for bits, _ in everywhere], dtype=bool)


# Both yield this process's part of each round. Parts are gathered after every round, so no process waits long


def _parts_to_send(keys: list[str], found: pa.Table, holders: np.ndarray) -> Iterator[pa.Table]:
    """Yield the scores that only some processes have: the first process that has a score sends it."""
    rows, senders = np.flatnonzero(holders.any(0) & ~holders.all(0)), holders.argmax(0)
    for start in range(0, len(rows), _ROWS_PER_ROUND):
        numbers = rows[start : start + _ROWS_PER_ROUND]
        mine = [keys[row] for row in numbers if senders[row] == PartialState().process_index]
        yield found.filter(pc.is_in(found[EXAMPLE_KEY], pa.array(mine, pa.string())))


def _parts_to_score(
    examples: Dataset,
    keys: list[str],
    load_scorer: Callable[[], Scorer],
    holders: np.ndarray,
    batch_tokens: int,
    description: str,
) -> Iterator[pa.Table]:
    """Compute the scores that no process has, one shard per round."""
    rows, state = np.flatnonzero(~holders.any(0)), PartialState()
    if len(rows) == 0:
        return
    examples, keys = examples.select(rows), [keys[row] for row in rows]
    lengths = [len(ids) for ids in examples["input_ids"]]
    shards = plan_shards(lengths, batch_tokens)
    mine = shards[state.process_index :: state.num_processes]
    total = sum(lengths[row] for shard in mine for batch in shard for row in batch)
    scorer = load_scorer()
    with tqdm(total=total, desc=description, unit=" tokens", disable=not state.is_main_process) as progress:
        for number in range(math.ceil(len(shards) / state.num_processes)):
            scored = []
            for batch in mine[number] if number < len(mine) else []:
                results = scorer([examples[row] for row in batch])
                scored += [{EXAMPLE_KEY: keys[row], **result} for row, result in zip(batch, results, strict=True)]
                progress.update(sum(lengths[row] for row in batch))
            yield pa.Table.from_pylist(scored)
    del scorer
    release_memory()


def _keep(table: pa.Table, known: pa.ChunkedArray, folder: Path, settings: dict) -> None:
    """Write the scores that this machine lacks. If machines share the folder, the main process writes first."""
    table = table.filter(pc.invert(pc.is_in(table[EXAMPLE_KEY], known)))
    state = PartialState()
    with state.main_process_first():
        if len(table) and state.is_local_main_process:
            write_scores(table, folder, settings)
