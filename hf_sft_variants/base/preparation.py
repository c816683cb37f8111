"""Truncation, dropping and packing of a tokenized data set, with its annotations."""

from collections.abc import Iterable, Sequence
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl import SFTConfig, pack_dataset

from ..errors import InputError
from .trl_internals import get_dataset_column_names


logger = get_logger(__name__)


def named_sets(eval_dataset: Any) -> dict[str, Any]:
    """The evaluation sets by their names: `"eval"` for a single one, and none for `None`."""
    if isinstance(eval_dataset, dict):
        return eval_dataset
    return {} if eval_dataset is None else {"eval": eval_dataset}


def map_description(dataset: Dataset | IterableDataset, args: SFTConfig, description: str) -> dict[str, Any]:
    """Keyword arguments of `map` and `filter`; none for streaming data sets, which do not take them."""
    if isinstance(dataset, IterableDataset):
        return {}
    return {"num_proc": args.dataset_num_proc, "desc": description}


def truncate(
    dataset: Dataset | IterableDataset, columns: Iterable[str], args: SFTConfig, packing: bool, dataset_name: str
) -> Dataset | IterableDataset:
    """
    Truncate the tokens, and those of `columns` that the data set has, as TRL does. Without packing, rows are cut to
    `max_length` by `truncation_mode`, and examples without a label left are dropped (and counted); with packing,
    `"bfd"` keeps the first `max_length` tokens, and `"bfd_split"` and `"wrapped"` keep all. Raises an `InputError`
    that names the row if a column has another length than `input_ids`.
    """
    if args.truncation_mode not in ("keep_start", "keep_end"):
        raise InputError(f"Unsupported truncation mode: {args.truncation_mode}, expected 'keep_start' or 'keep_end'")
    length = kept_length(args, packing)
    keep_end = length is not None and not packing and args.truncation_mode == "keep_end"
    token_columns = [column for column in columns if column in get_dataset_column_names(dataset)]
    if length is None and not token_columns:
        return dataset
    dataset = dataset.map(
        _truncate,
        with_indices=True,
        fn_kwargs={
            "token_columns": token_columns,
            "kept": slice(-length, None) if keep_end else slice(None, length),
            "dataset_name": dataset_name,
        },
        **map_description(dataset, args, f"Truncating {dataset_name} dataset"),
    )
    if length is None or packing:
        return dataset
    return _drop_without_labels(dataset, args, dataset_name)


def kept_length(args: SFTConfig, packing: bool) -> int | None:
    """Length that TRL truncates samples to; `None` where it keeps them whole or splits them in packing."""
    return args.max_length if not packing or args.packing_strategy == "bfd" else None


def _truncate(
    example: dict[str, Any], row: int, token_columns: list[str], kept: slice, dataset_name: str
) -> dict[str, Any]:
    num_tokens = len(example["input_ids"])
    for column in token_columns:
        values = example[column]
        if not isinstance(values, list) or len(values) != num_tokens:
            found = f"{len(values)} values" if isinstance(values, list) else repr(values)
            raise InputError(
                f"Row {row} of the {dataset_name} dataset: column `{column}` has {found}, but `input_ids` has "
                f"{num_tokens} tokens. Give one value for each token, counted before truncation and with the chat "
                "template's tokens."
            )
    return {column: example[column][kept] for column in ["input_ids", "labels", *token_columns]}


def _drop_without_labels(
    dataset: Dataset | IterableDataset, args: SFTConfig, dataset_name: str
) -> Dataset | IterableDataset:
    description = f"Dropping fully masked examples from {dataset_name} dataset"
    kept = dataset.filter(_has_label, **map_description(dataset, args, description))
    if isinstance(dataset, Dataset) and len(kept) < len(dataset):
        logger.warning(
            f"Dropped {len(dataset) - len(kept)} of {len(dataset)} examples of the {dataset_name} dataset: they "
            f"have no token in the loss, or none within `max_length={args.max_length}`."
        )
    return kept


def _has_label(example: dict[str, Any]) -> bool:
    return any(label != -100 for label in example["labels"])


def keep_scorable(dataset: Dataset, can_score: dict[str, Sequence[bool]], dataset_name: str) -> Dataset:
    """
    Drop the examples that one of the models can't score because they are too long for it, and log their number.
    `can_score` maps each model to whether it can score each example. Raises an `InputError` if none is left.
    """
    kept = [row for row, by_models in enumerate(zip(*can_score.values(), strict=True)) if all(by_models)]
    if len(kept) == len(dataset):
        return dataset
    counts = ", ".join(f"{values.count(False)} by {model}" for model, values in can_score.items() if not all(values))
    message = f"{len(dataset) - len(kept)} of {len(dataset)} examples of the {dataset_name} dataset can't be scored"
    if not kept:
        raise InputError(f"{message}: {counts}. Raise `max_length`, or choose models that can read more tokens.")
    logger.warning(f"Dropped examples that are too long for a reference model: {message}: {counts}.")
    return dataset.select(kept)


def require_supervised_token(dataset: Dataset | IterableDataset, dataset_name: str) -> None:
    """Refuse a data set that has no token in the loss. A stream can't be checked in advance, so it passes."""
    if isinstance(dataset, IterableDataset):
        return
    # The first token of a row is predicted by nothing, so a label there does not count
    if not any(_has_label({"labels": labels[1:]}) for labels in dataset["labels"]):
        raise InputError(
            f"The {dataset_name} dataset has no supervised token: it is empty, or every label is -100. "
            "Check the prompt and completion columns, the label masks, and whether `max_length` cuts the responses."
        )


def pack(
    dataset: Dataset | IterableDataset, annotation_columns: list[str], args: SFTConfig, dataset_name: str
) -> Dataset | IterableDataset:
    """Pack as `SFTTrainer` does, annotations included."""
    dataset = dataset.select_columns(["input_ids", "labels", *annotation_columns])
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    map_kwargs = map_description(dataset, args, f"Packing {dataset_name} dataset")
    return pack_dataset(dataset, args.max_length, args.packing_strategy, map_kwargs)
