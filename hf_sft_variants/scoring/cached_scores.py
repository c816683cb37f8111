"""Scores of a data set: what is on disk is read, what is missing is scored by all processes together and kept."""

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
from .locks import lock_of_folder
from .shards import concat_scores, plan_shards, read_scores, settings_folder, without_keys, write_scores


Scorer = Callable[[list[dict]], list[dict]]


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
    Scores of a data set: found on disk, or computed and kept there. To be called by all processes at once.

    A score belongs to the tokens it was made of: each distinct example is scored once, and found again in any data
    set, order and batch. The processes take turns in shards, and each finished shard is on disk, so a run that was
    killed goes on where it stopped. The processes need not see the same folder: what one of them finds or scores is
    sent to all, and each machine keeps its own copy.

    Args:
        dataset ([`~datasets.Dataset`]):
            Examples with `input_ids` and `labels`.
        load_scorer (`Callable`):
            Loads the scoring model, and returns what makes a dictionary of scores for each of a list of examples of
            similar length. Called only if scores are missing, when no other run is about to make them; the model is
            gone when this function returns.
        cache_dir (`str` or `Path`, *optional*):
            Folder of all scores, by default `hf_sft_variants/scores` in the Hugging Face home folder. Those of
            each `settings` have a folder of their own in it.
        settings (`dict`):
            All that the scores depend on besides the examples, as JSON values.
        batch_tokens (`int`):
            Most tokens of a batch, padding included; a longer example is a batch by itself.
        description (`str`):
            Text before the progress bar.
        max_tokens (`int`, *optional*):
            Most tokens that the model can read.

    Returns:
        `pa.Table`: The scorer's columns, a row for each example in the data set's order. An example with more than
        `max_tokens` tokens, or without a supervised token, has null.

    Raises:
        `InputError`: If the scores can't be written (what was scored so far is kept), or those on disk can't be read;
            if no example can be scored; if the processes have different examples or settings.
    """
    folder = settings_folder(cache_dir or Path(HF_HOME) / "hf_sft_variants" / "scores", settings)
    dataset = dataset.with_format(None).select_columns(["input_ids", "labels"])
    keys = content_keys(dataset, max_tokens)
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
                _parts_to_send(examples, wanted, found, holders, batch_tokens),
                _parts_to_score(examples, wanted, load_scorer, holders, batch_tokens, description),
            ):
                tables.append(concat_scores(gather_object([part])))
                _keep(without_keys(tables[-1], found[EXAMPLE_KEY]), folder, settings)
            scores = concat_scores(tables)
    place_of_key = {key: place for place, key in enumerate(scores[EXAMPLE_KEY].to_pylist())}
    places = pa.array([place_of_key.get(key) for key in keys], pa.int64())
    return scores.drop_columns(EXAMPLE_KEY).take(places)


def content_keys(dataset: Dataset, max_tokens: int | None = None) -> list[str | None]:
    """
    Name each example by what a model reads of it: a hash of its tokens and labels, equal for equal examples. `None`
    for one with more than `max_tokens` tokens, or without a supervised token.
    """
    keys = []
    for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=1000):
        for pair in zip(batch["input_ids"].to_numpy(), batch["labels"].to_numpy(), strict=True):
            # The first token is predicted by nothing
            is_read = (max_tokens is None or len(pair[0]) <= max_tokens) and (pair[1][1:] != -100).any()
            content = np.concatenate(pair, dtype=np.int64).tobytes()
            keys.append(hashlib.sha256(content).hexdigest()[:32] if is_read else None)
    return keys


def _require_same_on_all_processes(values: dict) -> None:
    everywhere = gather_object([values])
    for process, others in enumerate(everywhere):
        for name in (name for name in values if others.get(name) != everywhere[0].get(name)):
            raise InputError(
                f"Process {process} would score with another `{name}` than the main process: {others.get(name)!r}, "
                f"not {everywhere[0].get(name)!r}. Give all machines the same options, and copies of the same models "
                "and data."
            )


def _look_up(folder: Path, settings: dict, keys: list[str]) -> tuple[pa.Table, np.ndarray]:
    """The scores that this process finds, and which process finds which: a row for each, a column for each key."""
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


# Work goes in rounds, in which each process makes its part and gets those of the others: none waits long for another


def _parts_to_send(
    examples: Dataset, keys: list[str], found: pa.Table, holders: np.ndarray, batch_tokens: int
) -> Iterator[pa.Table]:
    """Scores that not all processes see: the first one that does sends them."""
    rows, senders = np.flatnonzero(holders.any(0) & ~holders.all(0)), holders.argmax(0)
    for shard in plan_shards(_lengths(examples.select(rows)), batch_tokens):
        numbers = [rows[number] for batch in shard for number in batch]
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
    """Scores that no process sees, in shards."""
    rows, state = np.flatnonzero(~holders.any(0)), PartialState()
    if len(rows) == 0:
        return
    examples, keys = examples.select(rows), [keys[row] for row in rows]
    lengths = _lengths(examples)
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


def _lengths(examples: Dataset) -> list[int]:
    return [len(ids) for ids in examples["input_ids"]]


def _keep(table: pa.Table, folder: Path, settings: dict) -> None:
    """Add the rows to the folder of each machine; of one folder that all share, the main process writes first."""
    state = PartialState()
    with state.main_process_first():
        if len(table) and state.is_local_main_process:
            write_scores(table, folder, settings)
