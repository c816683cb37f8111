"""Loading models and data sets for evaluation, with errors that name the fix."""

from typing import Any

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError, first_line
from ..scoring import load_model, load_tokenizer


# Ends the errors of data that can't be loaded
DATA_TO_PASS = (
    "Pass a folder with one file per split, e.g. train.jsonl (`hf-sft-variants quickstart` writes quickstart/data), "
    "or an id on the Hub."
)


def load_model_and_tokenizer(
    model: str,
    adapter: str | None = None,
    device: str | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """
    Load a causal language model, with a PEFT adapter if there is one, and its tokenizer.

    `model` and `adapter` are folders or Hub ids; if `model` is a PEFT adapter, it is loaded on the base model it
    names. The device is by default the accelerator if there is one, else the CPU. `options` are keyword arguments of
    `from_pretrained`; for `revision` see [`~hf_sft_variants.scoring.loading.find_files`]. Raises an `InputError` if
    the tokenizer has no chat template.
    """
    target = usable_device(device)
    tokenizer = load_tokenizer(model, options, adapter)
    if tokenizer.chat_template is None:
        raise InputError(f"`model` is {model!r}, whose tokenizer has no chat template: pass a chat model.")
    return load_model(model, options, target, adapter), tokenizer


def load_split(dataset: str, split: str = "test", config: str | None = None) -> Dataset:
    """
    Load one split of a data set, which is a folder with data files or an id on the Hub. Raises an `InputError` if it
    is empty.
    """
    try:
        rows = load_dataset(dataset, config, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        raise InputError(
            f"`dataset` {dataset!r} with `split` {split!r} could not be loaded ({first_line(error)}). {DATA_TO_PASS}"
        ) from error
    if len(rows) == 0:
        raise InputError(f"`split` {split!r} of `dataset` {dataset!r} is empty: choose another split.")
    return rows


def usable_device(device: str | None) -> torch.device:
    """The device of that name; by default the accelerator if there is one, else the CPU."""
    if device is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        number = torch.zeros(1, device=device)
        number.item()  # "meta" has no numbers
        return number.device
    except (RuntimeError, AssertionError) as error:  # an assertion where torch is built without that kind of device
        raise InputError(
            f"`device` is {device!r}, which can't be used here ({first_line(error)}): pass e.g. cpu or cuda:0."
        ) from error
