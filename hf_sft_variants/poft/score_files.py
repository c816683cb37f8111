"""Scores of reference models as tables: read from files made anywhere, joined to the examples by key, ranked."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq
from datasets import Dataset

from ..base.example_keys import EXAMPLE_KEY, add_content_keys
from ..errors import InputError
from ..scoring.shards import write_parquet
from .references import is_log_prob


# A row for each example and model; `docs/score_file.md` says what stands in them
SCHEMA = pa.schema(
    {
        EXAMPLE_KEY: pa.string(),
        "model": pa.string(),
        "sum_log_prob": pa.float64(),
        "num_tokens": pa.int64(),
        "mean_log_prob": pa.float64(),
        "score_end_of_turn": pa.bool_(),
    }
)
_REQUIRED = [EXAMPLE_KEY, "model", "score_end_of_turn"]
_ON_FILES = "See docs/score_file.md."

__all__ = ["SCHEMA", "add_content_keys", "join_by_key", "keys_of_best", "read_score_files", "write_score_file"]


def write_score_file(scores: pa.Table, path: str | Path) -> None:
    """Write a table of `SCHEMA` as Parquet, for `reference_score_file`."""
    write_parquet(scores.cast(SCHEMA), Path(path))


def read_score_files(paths: Sequence[str], score_end_of_turn: bool) -> pa.Table:
    """
    Read score files, Parquet or JSON lines, into one table of `SCHEMA`; columns that they lack are null.

    Args:
        paths (`Sequence[str]`):
            Files that end in `.parquet` or `.jsonl`.
        score_end_of_turn (`bool`):
            What the files have to say of it.

    Raises:
        `InputError`: If a file can't be read, lacks columns, or was made with another setting of `score_end_of_turn`.
    """
    return pa.concat_tables([_read_score_file(path, score_end_of_turn) for path in paths])


def _read_score_file(path: str, score_end_of_turn: bool) -> pa.Table:
    where = f"`reference_score_file` {path!r}"
    if Path(path).suffix not in (".parquet", ".jsonl"):
        raise InputError(f"{where} is neither .parquet nor .jsonl: give one of these. {_ON_FILES}")
    if not Path(path).is_file():
        raise InputError(f"{where} can't be read: there is no such file. {_ON_FILES}")
    try:
        table = pq.read_table(path) if path.endswith(".parquet") else pyarrow.json.read_json(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{where} can't be read: {error} {_ON_FILES}") from error
    missing = [column for column in _REQUIRED if column not in table.column_names]
    if not {"sum_log_prob", "num_tokens"} <= set(table.column_names) and "mean_log_prob" not in table.column_names:
        missing.append("sum_log_prob` and `num_tokens")
    if missing:
        raise InputError(f"{where} has no column `{missing[0]}`, only {table.column_names}. {_ON_FILES}")
    others = pc.unique(table["score_end_of_turn"]).to_pylist()
    if others != [score_end_of_turn]:
        raise InputError(
            f"{where} has `score_end_of_turn` {others}, but `score_end_of_turn={score_end_of_turn}` is asked for. Set "
            "it as it was when the scores were made, or score again."
        )
    try:
        columns = [
            table[field.name].cast(field.type)
            if field.name in table.column_names
            else pa.nulls(len(table), field.type)
            for field in SCHEMA
        ]
    except pa.ArrowException as error:
        raise InputError(f"{where} has a value of the wrong type: {error} {_ON_FILES}") from error
    for name in (EXAMPLE_KEY, "model"):
        if table[name].null_count:
            row = pc.index(table[name].is_null(), True).as_py()
            raise InputError(f"{where} has no `{name}` in row {row}. {_ON_FILES}")
    return pa.table(columns, schema=SCHEMA)


def join_by_key(
    dataset: Dataset, scores: pa.Table, model: str, length_normalizer: str, dataset_name: str
) -> list[float | None]:
    """
    A reference model's r_j for each example, in nats per token; `None` where the scores say that it can't be scored.

    Args:
        dataset ([`~datasets.Dataset`]):
            Examples with `example_key`, `example_row` and `num_scored_tokens`.
        scores (`pa.Table`):
            Of `SCHEMA`, in any order, with other examples and models too.
        model (`str`):
            Whose scores to take.
        length_normalizer (`str`):
            `"own"`: the mean over the model's own tokens. `"target"`: its summed log-probability over the number of
            the trained model's tokens.

    Raises:
        `InputError`: If an example has no score, or two different ones, or a score is no finite number of at most 0.
    """
    score_of_key = {}
    for score in scores.filter(pc.equal(scores["model"], model)).select([*SCHEMA.names[2:5], EXAMPLE_KEY]).to_pylist():
        key = score.pop(EXAMPLE_KEY)
        if not _same_score(score_of_key.setdefault(key, score), score):
            raise InputError(
                f"The example with the key {key} has two different scores of {model!r}: {score_of_key[key]} and "
                f"{score}. Remove one of them from the score files."
            )
    results = []
    columns = (dataset[name] for name in ("example_row", EXAMPLE_KEY, "num_scored_tokens"))
    for row, key, num_tokens in zip(*columns, strict=True):
        where = f"Row {row} of the {dataset_name} dataset (key {key})"
        if key not in score_of_key:
            raise InputError(
                f"{where} has no score of the reference model {model!r}. Score it and add it to the score files, or "
                "remove the row."
            )
        results.append(_mean_log_prob(score_of_key[key], num_tokens, length_normalizer, f"{where}, model {model!r}"))
    return results


def _same_score(first: dict, second: dict) -> bool:
    """Up to rounding: a row that stands in two data sets is scored in two batches."""
    return first is second or all(
        value == second[name]
        or (None not in (value, second[name]) and math.isclose(value, second[name], rel_tol=1e-4))
        for name, value in first.items()
    )


def _mean_log_prob(score: dict, num_target_tokens: int, length_normalizer: str, where: str) -> float | None:
    total, num_tokens, mean = score["sum_log_prob"], score["num_tokens"], score["mean_log_prob"]
    if total is None and mean is None:
        return None
    if length_normalizer == "target":
        if total is None:
            raise InputError(
                f"{where}: `length_normalizer='target'` needs summed log-probabilities, but the score files have the "
                "mean alone. Add `sum_log_prob` to them, or set `length_normalizer='own'`."
            )
        mean = total / num_target_tokens
    elif total is not None and num_tokens:
        mean = total / num_tokens
    if not is_log_prob(mean):
        raise InputError(
            f"{where}: the score {score} gives no finite mean log-probability of 0 or less. Correct it in the score "
            "files."
        )
    given = score["mean_log_prob"]
    if length_normalizer == "own" and given is not None and not math.isclose(mean, given, rel_tol=1e-3, abs_tol=1e-6):
        raise InputError(
            f"{where}: the score {score} contradicts itself, `mean_log_prob` is not `sum_log_prob` over `num_tokens`. "
            "Correct it in the score files."
        )
    return mean


def keys_of_best(scores: pa.Table, share: float) -> set[str]:
    """
    Keys of the examples that the reference models find most likely: the best share by the mean of the models' mean
    log-probabilities, at least one. An example that a model can't score is not among them.
    """
    means = {}
    for score in scores.select([EXAMPLE_KEY, "model", "mean_log_prob"]).to_pylist():
        means.setdefault(score[EXAMPLE_KEY], {})[score["model"]] = score["mean_log_prob"]
    means = {key: fmean(of_models.values()) for key, of_models in means.items() if None not in of_models.values()}
    ranked = sorted(means, key=means.get, reverse=True)
    return set(ranked[: max(round(share * len(ranked)), 1)])
