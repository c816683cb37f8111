"""Loading what is to be evaluated, with an error that says the fix where that is not possible."""

from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .errors import InputError, first_line


def load_model_and_tokenizer(
    model: str, adapter: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """
    Loads a causal language model, with a PEFT adapter if there is one.

    Args:
        model (`str`):
            Folder or Hub id of a model. A folder that holds a PEFT adapter is loaded on the base model it names.
        adapter (`str`, *optional*):
            Folder of a PEFT adapter to load on `model`.
        device (`str`, *optional*):
            Where to put the model, e.g. `"cpu"` or `"cuda:1"`. By default the accelerator if there is one, else
            the CPU.

    Returns:
        `tuple`: The model in evaluation mode, and its tokenizer.

    Raises:
        InputError: If the model or the adapter cannot be loaded, the tokenizer has no chat template or torch does not
            know the device.
    """
    target = _torch_device(device)
    if adapter is None and _is_adapter(model):
        model, adapter = PeftConfig.from_pretrained(model).base_model_name_or_path, model
    elif adapter is not None and not _is_adapter(adapter):
        raise InputError(f"`adapter` is {adapter!r}, which has no adapter_config.json: pass a folder that PEFT saved.")
    try:
        # The tokenizer that was trained with stands beside the adapter
        tokenizer = AutoTokenizer.from_pretrained(adapter if adapter and _has_tokenizer(adapter) else model)
        loaded = AutoModelForCausalLM.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InputError(
            f"`model` is {model!r}, which could not be loaded ({first_line(error)}): pass a folder that "
            "holds a saved model, or an id on the Hub; for an adapter whose base model has moved, pass the base model "
            "as `model` and the adapter's folder as `adapter`."
        ) from error
    if tokenizer.chat_template is None:
        raise InputError(f"`model` is {model!r}, whose tokenizer has no chat template: pass a chat model.")
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    return loaded.to(target).eval(), tokenizer


def load_split(dataset: str, split: str = "test", config: str | None = None) -> Dataset:
    """
    Loads one split of a data set.

    Args:
        dataset (`str`):
            Folder with data files, or Hub id.
        split (`str`, *optional*, defaults to `"test"`):
            Name of the split.
        config (`str`, *optional*):
            Name of the configuration, for data sets that have several.

    Returns:
        `Dataset`: The rows.

    Raises:
        InputError: If there is no such data set or split, or it is empty.
    """
    try:
        rows = load_dataset(dataset, config, split=split)
    except (DatasetNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"`dataset` {dataset!r} with `split` {split!r} could not be loaded ({first_line(error)}): pass a "
            "folder that holds one file per split, e.g. test.jsonl (`hf-sft-variants quickstart` writes one), or an "
            "id on the Hub."
        ) from error
    if len(rows) == 0:
        raise InputError(f"`split` {split!r} of `dataset` {dataset!r} is empty: choose another split.")
    return rows


def check_dataset(dataset: Dataset, columns: Sequence[str]) -> None:
    """
    Checks that a data set can be evaluated.

    Args:
        dataset (`Dataset`):
            The data set.
        columns (`Sequence[str]`):
            Columns it must have; `prompt` and `completion` must be conversations.

    Raises:
        InputError: If the data set is empty, lacks a column or has no conversations.
    """
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise InputError(
            f"`dataset` has no column {', '.join(map(repr, missing))}, only "
            f"{', '.join(map(repr, dataset.column_names))}: rename or add what is missing."
        )
    if len(dataset) == 0:
        raise InputError("`dataset` is empty: pass at least one row.")
    for column in columns:
        value = dataset[0][column]
        if column != "answer" and not isinstance(value, list):
            raise InputError(
                f"Column {column!r} of `dataset` holds {value!r}: pass conversations, i.e. lists of "
                "{'role': ..., 'content': ...}."
            )


def _is_adapter(folder: str) -> bool:
    return Path(folder, "adapter_config.json").is_file()


def _has_tokenizer(folder: str) -> bool:
    return Path(folder, "tokenizer_config.json").is_file()


def _torch_device(device: str | None) -> torch.device:
    if device is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InputError(f"`device` is {device!r}, which torch does not know: pass e.g. cpu or cuda:0.") from error
