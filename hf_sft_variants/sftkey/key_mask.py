"""Marks the tokens of an example that belong to its key."""

from enum import IntEnum
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from ..base.preparation import map_description
from ..base.row_checks import require_row
from ..base.trl_internals import get_dataset_column_names, global_then_local_main_first
from ..errors import InputError
from ..evaluation.tagged_answers import tagged_response
from ..text.assistant_turns import RenderedExample
from ..text.key_finder import KeyFinder, NoKeyError
from ..text.turn_reader import TurnReader


class KeyMask(IntEnum):
    """Values of the column `key_mask`."""

    NO_LABEL = -1
    NOT_KEY = 0
    KEY = 1


NO_LABEL, NOT_KEY, KEY = map(int, KeyMask)


def key_mask(example: RenderedExample, labels: list[int], find_key: KeyFinder) -> list[int]:
    """
    Mark the tokens of an example: 1 for tokens of the key, 0 for other tokens in the loss, -1 for tokens without a
    label. Raises a `NoKeyError` if there is no key, a turn has more than one, or no token of the key has a label.
    """
    mask = _no_key(labels)
    for tokens in find_key.tokens_by_turn(example).values():
        for i in tokens:
            mask[i] = KEY if mask[i] != NO_LABEL else NO_LABEL
    if KEY not in mask[1:]:
        raise NoKeyError("no token of its key is in the loss: check the labels")
    return mask


def _no_key(labels: list[int]) -> list[int]:
    return [NOT_KEY if label != -100 else NO_LABEL for label in labels]


def add_key_mask(
    examples: dict[str, list],
    rows: list[int],
    find_key: KeyFinder,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    text_field: str,
    has_text: bool,
    on_missing: str,
    dataset_name: str,
) -> dict[str, list]:
    """
    Add the column `num_key_tokens` and, unless the rows already have it, `key_mask`. For `Dataset.map`, batched.

    Rows with text or messages (`has_text`) are rendered; the tokens of all others are decoded. For an example with no
    key, or with several, `on_missing="error"` raises an `InputError` that names the row, `"drop"` sets its number of
    key tokens to -1, and `"ignore"` marks no tokens. Also raises an `InputError` if the chat template omits the
    answer, or if an existing `key_mask` has values other than 1, 0 and -1.
    """
    read_turns = TurnReader(tokenizer, chat_template, text_field, has_text, find_key)
    masks, counts = [], []
    for i, row in enumerate(rows):
        example = {column: values[i] for column, values in examples.items() if values[i] is not None}
        try:
            if "key_mask" in example:
                mask = _own_mask(example["key_mask"], example["labels"])
            else:
                mask, labels = [], example["labels"]
                for document in read_turns(example):
                    of_document = labels[len(mask) : len(mask) + len(document.token_ids)]
                    mask += key_mask(document, of_document, find_key)
        except InputError as problem:
            if on_missing == "error" or (on_missing == "drop" and not isinstance(problem, NoKeyError)):
                raise InputError(_missing_key_message(row, dataset_name, problem)) from problem
            mask = _no_key(example["labels"])
            counts.append(-1 if on_missing == "drop" else 0)
        else:
            counts.append(mask.count(KEY))
        masks.append(mask)
    return {"key_mask": masks, "num_key_tokens": counts}


def _own_mask(mask: list[int], labels: list[int]) -> list[int]:
    wrong = [value for value in mask if value not in (KEY, NOT_KEY, NO_LABEL)]
    if wrong:
        raise InputError(f"column `key_mask` has {wrong[0]!r}: it must be 1 on tokens of the key and 0 on others")
    if len(mask) != len(labels):
        return mask  # refused before truncation, like every per-token column
    mask = [value if label != -100 else NO_LABEL for value, label in zip(mask, labels, strict=True)]
    if KEY not in mask[1:]:
        raise NoKeyError("column `key_mask` is not 1 on any token in the loss")
    return mask


def _missing_key_message(row: int, dataset_name: str, problem: InputError) -> str:
    message = f"Row {row} of the {dataset_name} dataset: {problem}."
    if isinstance(problem, NoKeyError):
        message += (
            " Specify where the answer is with `key_delimiter`, `key_pattern`, the tags, or `reasoning_column` and "
            "`answer_column`; or set `missing_key='drop'` to train without such examples."
        )
    return message


def has_whole_key(example: dict[str, Any]) -> bool:
    """Whether truncation has kept all tokens of the key, at least one of which is predicted."""
    mask = example["key_mask"]
    return KEY in mask[1:] and mask.count(KEY) == example["num_key_tokens"]


def _tagged(
    example: dict[str, Any],
    row: int,
    reasoning_column: str,
    answer_column: str,
    thinking_tags: list[str],
    answer_tags: list[str],
    dataset_name: str,
) -> dict[str, Any]:
    """Build the response from a reasoning and an answer, replacing any existing response. For `Dataset.map`."""
    where = f"Row {row} of the {dataset_name} dataset"
    for name, column in (("reasoning_column", reasoning_column), ("answer_column", answer_column)):
        if column not in example:
            raise InputError(f"{where} has no column `{column}`, which `{name}` names; it has {sorted(example)}.")
        if not isinstance(example[column], str):
            raise InputError(f"{where}: column `{column}` (`{name}`) has {example[column]!r}; it must be a string.")
    response = tagged_response(example[reasoning_column], example[answer_column], thinking_tags, answer_tags)
    message = {"role": "assistant", "content": response}
    if isinstance(example.get("prompt"), str):
        return {"completion": response}
    if "prompt" in example:
        return {"completion": [message]}
    if not example.get("messages"):
        raise InputError(f"{where} has neither `prompt` nor `messages` to respond to; it has {sorted(example)}.")
    messages = example["messages"]
    return {"messages": (messages[:-1] if messages[-1]["role"] == "assistant" else messages) + [message]}


def tag_responses(dataset: Dataset | IterableDataset, args: SFTConfig, dataset_name: str) -> Dataset | IterableDataset:
    """Build tagged responses from the columns with reasonings and answers, unless the rows are tokenized."""
    require_row(f"The {dataset_name} dataset", dataset)
    has_transform = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"  # `SFTTrainer` refuses it
    if has_transform or "input_ids" in get_dataset_column_names(dataset):
        return dataset
    options = ("reasoning_column", "answer_column", "thinking_tags", "answer_tags")
    fn_kwargs = {**{name: getattr(args, name) for name in options}, "dataset_name": dataset_name}
    map_kwargs = map_description(dataset, args, f"Tagging responses of {dataset_name} dataset")
    with global_then_local_main_first():
        return dataset.with_format(None).map(_tagged, with_indices=True, fn_kwargs=fn_kwargs, **map_kwargs)
