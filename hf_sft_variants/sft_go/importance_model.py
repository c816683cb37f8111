"""The model of `group_by="llmlingua2"`: any token classifier that says which sub-words to keep."""

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

from ..errors import InputError
from ..scoring import identify_model, refuse_zero3


# Most sub-words of a window, special tokens included: what LLMLingua-2 was trained with
MAX_WINDOW = 512

_NEEDED = (
    "`group_by='llmlingua2'` needs the id or the folder of a token-classification model with two labels, 1 for words "
    "to keep, such as 'microsoft/llmlingua-2-xlm-roberta-large-meetingbank'."
)


def identify_importance_model(model: str) -> dict[str, str]:
    """
    What tells an importance model from others ([`~hf_sft_variants.scoring.identify_model`]).

    Raises:
        `InputError`: If there is no such model.
    """
    with _loading(model):
        return identify_model(model)


def load_importance_model(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a token-classification model to score data with, and its tokenizer: evaluation mode, no gradients, on this
    process's device.

    Args:
        model (`str`):
            Model id or folder. The weights are bfloat16 on an accelerator, float32 on the CPU.

    Raises:
        `InputError`: If the model can't be loaded, is no token classifier with two labels, or its tokenizer gives no
            offsets; under DeepSpeed ZeRO-3.
    """
    refuse_zero3(model)
    with _loading(model):
        config = AutoConfig.from_pretrained(model)
    architectures = config.architectures or []
    # Any backbone would be loaded, with a classifier of random weights
    if architectures and not any(name.endswith("ForTokenClassification") for name in architectures):
        raise InputError(f"`importance_model={model!r}` is a {architectures[0]}. {_NEEDED}")
    if config.num_labels != 2:
        raise InputError(f"`importance_model={model!r}` has {config.num_labels} labels. {_NEEDED}")
    with _loading(model):
        tokenizer = AutoTokenizer.from_pretrained(model)
    if not tokenizer.is_fast:
        raise InputError(
            f"`importance_model={model!r}` comes with a {type(tokenizer).__name__}, which gives no character offsets. "
            "Save a fast tokenizer (tokenizer.json) beside the model, or choose another model."
        )
    device = PartialState().device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with _loading(model):
        loaded, info = AutoModelForTokenClassification.from_pretrained(model, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise InputError(f"`importance_model={model!r}` lacks the weights {sorted(info['missing_keys'])}. {_NEEDED}")
    return loaded.to(device).eval().requires_grad_(False), tokenizer


@contextmanager
def _loading(model: str):
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"`importance_model={model!r}` can't be loaded: {error} {_NEEDED}") from error


def max_window(model: PreTrainedModel) -> int:
    """Most sub-words that a model reads at once, special tokens included: `MAX_WINDOW`, or its positions if fewer."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa and its like count positions from after the padding token's id
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(module.num_embeddings - skipped, MAX_WINDOW)
    return min(getattr(model.config, "max_position_embeddings", None) or MAX_WINDOW, MAX_WINDOW)
