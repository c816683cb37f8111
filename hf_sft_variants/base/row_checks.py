"""Checks of the user's rows for what `SFTTrainer` would fail on late, or train on silently."""

import json
from collections.abc import Callable
from reprlib import repr as short
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..errors import InputError
from .token_checks import TOKEN_COLUMNS, check_token_rows
from .trl_internals import get_dataset_column_names


_TEXT_COLUMNS = ("prompt", "completion", "messages", "conversations", "tools", "chat_template_kwargs")


def require_row(name: str, dataset: Dataset | IterableDataset) -> None:
    """Refuse a data set or stream without rows."""
    if next(iter(dataset), None) is None:
        raise InputError(f"{name} is empty. Check the split and the filters that made it.")


def refuse_token_columns(dataset: Dataset | IterableDataset, dataset_name: str) -> None:
    """
    Refuse columns that `SFTTrainer` reads as belonging to tokens, such as `labels` with the class of each text, in a
    data set whose rows have no tokens yet.
    """
    columns = get_dataset_column_names(dataset)
    for name in ("labels", "assistant_masks", "seq_lengths"):
        if name in columns:
            raise InputError(
                f"The {dataset_name} dataset has the column `{name}`, but no `input_ids`. SFTTrainer would use it for "
                "the tokens that it makes of the rows. Rename the column or remove it."
            )


def check_rows(
    dataset: Dataset | IterableDataset, args: SFTConfig, tokenizer: PreTrainedTokenizerBase, dataset_name: str
) -> Dataset | IterableDataset:
    """
    Check every row of a data set of texts, messages or tokens, and return the data set; the rows of a stream are
    checked as they arrive. Raises an `InputError` that names a row that can't be trained on.
    """
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return dataset  # refused by TRL
    columns = get_dataset_column_names(dataset)
    has_tokens = "input_ids" in columns
    known = TOKEN_COLUMNS if has_tokens else (*_TEXT_COLUMNS, args.dataset_text_field)
    found = [column for column in known if column in columns]
    if not {"prompt", "messages", "conversations", "input_ids", args.dataset_text_field} & set(found):
        raise InputError(
            f"The {dataset_name} dataset has the columns {sorted(columns)}, but none to train on: `prompt` and "
            f"`completion`, `messages`, `{args.dataset_text_field}` (`dataset_text_field`), or `input_ids`."
        )
    if args.completion_only_loss and not {"prompt", "labels", "completion_mask"} & set(found):
        raise InputError(
            "`completion_only_loss=True` needs `prompt` and `completion`, or `completion_mask`, but the "
            f"{dataset_name} dataset has the columns {sorted(columns)}: all tokens would be in the loss."
        )
    if has_tokens:
        return check_token_rows(dataset, found, max(tokenizer.get_vocab().values()) + 1, dataset_name)
    options = {"text_field": args.dataset_text_field, "dataset_name": dataset_name}
    if isinstance(dataset, IterableDataset):
        return dataset.map(_checked, with_indices=True, fn_kwargs=options)
    # The result is not used, but the next run finds it in the cache
    description = {"num_proc": args.dataset_num_proc, "desc": f"Checking {dataset_name} dataset"}
    dataset.select_columns(found).filter(_is_sound, with_indices=True, fn_kwargs=options, **description)
    return dataset


def _checked(example: dict[str, Any], row: int, **options: Any) -> dict[str, Any]:
    _is_sound(example, row, **options)
    return example


def _is_sound(example: dict[str, Any], row: int, text_field: str, dataset_name: str) -> bool:
    problem = _problem_of_text(example, text_field)
    if problem is not None:
        raise InputError(f"Row {row} of the {dataset_name} dataset: {problem}.")
    return True


def _problem_of_text(example: dict[str, Any], text_field: str) -> str | None:
    if not isinstance(example.get("chat_template_kwargs", {}), dict):
        return f"`chat_template_kwargs` is {short(example['chat_template_kwargs'])}; give a mapping, such as {{}}"
    if isinstance(example.get("tools"), str):
        try:
            json.loads(example["tools"])
        except ValueError as error:
            return f"`tools` is {short(example['tools'])}, which is not JSON ({error})"
    if "prompt" in example:
        return _problem_of_prompt(example)
    if "messages" in example and (isinstance(example["messages"], list) or text_field not in example):
        return _problem_of_messages("messages", example["messages"], "role", "content")
    if "conversations" in example and text_field not in example:
        return _problem_of_messages("conversations", example["conversations"], "from", "value")
    if not isinstance(example[text_field], str):
        return f"`{text_field}` is {short(example[text_field])}; give a text"
    return None


def _problem_of_prompt(example: dict[str, Any]) -> str | None:
    if "completion" not in example:
        return "there is a `prompt`, but no `completion`"
    parts = {name: example[name] for name in ("prompt", "completion")}
    if all(isinstance(part, str) for part in parts.values()):
        return None
    if not all(isinstance(part, list) for part in parts.values()):
        return (
            f"`prompt` is {short(parts['prompt'])} and `completion` {short(parts['completion'])}; give two texts, or "
            "two lists of messages"
        )
    problems = [_problem_of_messages(name, part, "role", "content") for name, part in parts.items()]
    return problems[0] or problems[1]


def _problem_of_messages(name: str, messages: Any, role: str, content: str) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f"`{name}` is {short(messages)}; give a list of messages"
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get(role), str):
            return f"message {number} of `{name}` has no `{role}`: {short(message)}"
        says_more = any(value for key, value in message.items() if key not in (role, content))
        found = message.get(content)
        if not isinstance(found, str | list | dict) and not (found is None and says_more):
            return f"message {number} of `{name}` has {short(found)} as `{content}`; give a text"
    return None


def checked_text(example: dict[str, Any], formatting_func: Callable[[dict[str, Any]], str]) -> str:
    """Apply the user's `formatting_func` to a row, and refuse a result that is not a text."""
    text = formatting_func(example)
    if not isinstance(text, str):
        raise InputError(f"`formatting_func` must return a text, got {short(text)} for the row {short(example)}.")
    return text


def require_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset | IterableDataset, dataset_name: str
) -> None:
    """Refuse token ids without an embedding, which would be an index error in the middle of training. Streams pass."""
    num_embeddings = model.config.get_text_config().vocab_size
    if max(tokenizer.get_vocab().values()) < num_embeddings:
        return
    if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
        tables = dataset.select_columns("input_ids").with_format("arrow").iter(1000)
        largest = max((pc.max(pc.list_flatten(table["input_ids"])).as_py() or 0 for table in tables), default=0)
        if largest >= num_embeddings:
            raise InputError(
                f"The {dataset_name} dataset has the token id {largest}, but the model has {num_embeddings} "
                "embeddings. Pass the model's own tokenizer as `processing_class`, or call "
                "`model.resize_token_embeddings`."
            )
