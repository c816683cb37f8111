"""Tables of reference scores: read from files of any origin, joined to the examples by key, ranked."""

import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..base.example_keys import EXAMPLE_KEY, add_content_keys
from ..errors import InputError
from ..scoring.joins import find_conflict
from ..scoring.shards import write_parquet
from ..scoring.user_tables import read_user_table
from .references import is_log_prob


# One row per example and model; see `docs/score_file.md`
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
_VALUES = ["sum_log_prob", "num_tokens", "mean_log_prob"]
_SEE_DOCS = "See docs/score_file.md."

__all__ = ["SCHEMA", "add_content_keys", "join_by_key", "keys_of_best", "read_score_files", "write_score_file"]


def write_score_file(scores: pa.Table, path: str | Path) -> None:
    """Write a table with `SCHEMA` as Parquet, for `reference_score_file`."""
    write_parquet(scores.cast(SCHEMA), Path(path))


def read_score_files(paths: Sequence[str], score_end_of_turn: bool) -> pa.Table:
    """
    Read Parquet or JSON Lines score files into one table with `SCHEMA`; missing columns are filled with nulls. Raises
    an `InputError` if a file can't be read, lacks columns, or was made with another `score_end_of_turn`.
    """
    tables = [_read_score_file(path, score_end_of_turn) for path in paths]
    return pa.concat_tables([SCHEMA.empty_table(), *tables], promote_options="default")


def _read_score_file(path: str, score_end_of_turn: bool) -> pa.Table:
    where = f"`reference_score_file` {path!r}"
    if Path(path).suffix not in (".parquet", ".jsonl"):
        raise InputError(f"{where} is neither .parquet nor .jsonl: give one of these. {_SEE_DOCS}")
    table = read_user_table(path, where, SCHEMA, [EXAMPLE_KEY, "model", "score_end_of_turn"], _SEE_DOCS)
    table = table.replace_schema_metadata(None)
    if not {"sum_log_prob", "num_tokens"} <= {*table.column_names} and "mean_log_prob" not in table.column_names:
        raise InputError(f"{where} has no column `sum_log_prob` and `num_tokens`, or `mean_log_prob`. {_SEE_DOCS}")
    settings = pc.unique(table["score_end_of_turn"]).to_pylist()
    if settings != [score_end_of_turn]:
        raise InputError(
            f"{where} has `score_end_of_turn` {settings}, but `score_end_of_turn={score_end_of_turn}` is set. Set it "
            "to the value the scores were made with, or score again."
        )
    for name in (EXAMPLE_KEY, "model"):
        if table[name].null_count:
            row = pc.index(table[name].is_null(), True).as_py()
            raise InputError(f"{where} has no `{name}` in row {row}. {_SEE_DOCS}")
    return table


def join_by_key(
    dataset: Dataset, scores: pa.Table, model: str, length_normalizer: str, dataset_name: str
) -> list[float | None]:
    """
    Score r_j of each example by a reference model, in nats per token; `None` if the model could not score the example.
    `dataset` has `example_key`, `example_row` and `num_scored_tokens`; `scores`, with `SCHEMA`, is in any order and
    may have other examples and models. Raises an `InputError` if an example has no score or two different ones, or a
    score is not a finite number of at most 0.
    """
    scores = scores.filter(pc.equal(scores["model"], model))
    conflict = find_conflict(scores, _VALUES)
    if conflict is not None:
        first, other = ({name: row[name] for name in _VALUES} for row in conflict)
        raise InputError(
            f"The example with the key {conflict[0][EXAMPLE_KEY]} has two different scores of {model!r}: {first} and "
            f"{other}. Remove one of them from the score files."
        )
    score_of_key = {score.pop(EXAMPLE_KEY): score for score in scores.select([EXAMPLE_KEY, *_VALUES]).to_pylist()}
    means = []
    columns = (dataset[name] for name in ("example_row", EXAMPLE_KEY, "num_scored_tokens"))
    for row, key, num_tokens in zip(*columns, strict=True):
        where = f"Row {row} of the {dataset_name} dataset (key {key})"
        if key not in score_of_key:
            raise InputError(
                f"{where} has no score of the reference model {model!r}. Score it and add it to the score files, or "
                "remove the row."
            )
        means.append(_mean_log_prob(score_of_key[key], num_tokens, length_normalizer, f"{where}, model {model!r}"))
    return means


def _mean_log_prob(score: dict, num_target_tokens: int, length_normalizer: str, where: str) -> float | None:
    total, num_tokens, given = (score[name] for name in _VALUES)
    if total is None and given is None:
        return None
    if length_normalizer == "target" and total is None:
        raise InputError(
            f"{where}: `length_normalizer='target'` needs summed log-probabilities, but the score files only have the "
            "mean. Add `sum_log_prob` to them, or set `length_normalizer='own'`."
        )
    divisor = num_target_tokens if length_normalizer == "target" else num_tokens
    mean = total / divisor if total is not None and divisor else given
    if not is_log_prob(mean):
        raise InputError(
            f"{where}: the score {score} gives no finite mean log-probability of 0 or less. Correct it in the score "
            "files."
        )
    if length_normalizer == "own" and given is not None and not math.isclose(mean, given, rel_tol=1e-3, abs_tol=1e-6):
        raise InputError(
            f"{where}: the score {score} contradicts itself, `mean_log_prob` is not `sum_log_prob` over `num_tokens`. "
            "Correct it in the score files."
        )
    return mean


def keys_of_best(scores: pa.Table, share: float) -> set[str]:
    """
    Keys of the best share of the examples, at least one, by the mean of the reference models' mean log-probabilities.
    Leaves out examples that a model could not score.
    """
    mean_of_all = pc.ScalarAggregateOptions(skip_nulls=False)
    means = scores.group_by(EXAMPLE_KEY).aggregate([("mean_log_prob", "mean", mean_of_all)]).drop_null()
    ranked = means.sort_by([("mean_log_prob_mean", "descending")])[EXAMPLE_KEY]
    return set(ranked[: max(round(share * len(ranked)), 1)].to_pylist())
