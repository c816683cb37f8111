"""The model of `group_by="llmlingua2"`: a token classifier that predicts which words to keep."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import InputError, first_line
from ..scoring import identify_model, refuse_zero3


# Most sub-words of a window, special tokens included: what LLMLingua-2 was trained with
MAX_WINDOW = 512

_NEEDED = (
    "`group_by='llmlingua2'` needs the id or the folder of a token-classification model with two labels, 1 for words "
    "to keep, such as 'microsoft/llmlingua-2-xlm-roberta-large-meetingbank'."
)


def identify_importance_model(model: str) -> dict[str, str]:
    """As [`~hf_sft_variants.scoring.identify_model`], with errors about `importance_model`."""
    with _errors_of_loading(model):
        return identify_model(model)


def load_importance_model(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a token classifier and its tokenizer to score with, on this process's device; bfloat16 on an accelerator.
    Raises an `InputError` if the model is not a token classifier with two labels or its tokenizer gives no offsets,
    and under DeepSpeed ZeRO-3.
    """
    refuse_zero3(model)
    device = PartialState().device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with _errors_of_loading(model):
        config = AutoConfig.from_pretrained(model)
        architectures = config.architectures or []
        # Any backbone would be loaded, with a classifier of random weights
        if architectures and not any(name.endswith("ForTokenClassification") for name in architectures):
            raise InputError(f"it is a {architectures[0]}")
        if config.num_labels != 2:
            raise InputError(f"it has {config.num_labels} labels")
        tokenizer = AutoTokenizer.from_pretrained(model)
        if not tokenizer.is_fast:
            raise InputError(
                f"its tokenizer is a {type(tokenizer).__name__}, which gives no character offsets. Save a fast "
                "tokenizer (tokenizer.json) with the model, or choose another model"
            )
        loaded, info = AutoModelForTokenClassification.from_pretrained(model, dtype=dtype, output_loading_info=True)
        if info["missing_keys"]:
            raise InputError(f"it lacks the weights {sorted(info['missing_keys'])}")
    return loaded.to(device).eval().requires_grad_(False), tokenizer


@contextmanager
def _errors_of_loading(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = first_line(error).rstrip(".")
        raise InputError(f"`importance_model={model!r}` can't be loaded: {reason}. {_NEEDED}") from error


def max_window(model: PreTrainedModel) -> int:
    """Most sub-words that a model reads at once, special tokens included: its positions, at most `MAX_WINDOW`."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa and models like it count positions from after the padding token's id
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(module.num_embeddings - skipped, MAX_WINDOW)
    return min(getattr(model.config, "max_position_embeddings", None) or MAX_WINDOW, MAX_WINDOW)
