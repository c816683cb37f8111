"""Loading reference models, which score data and are never trained, and identifying them for the cache."""

import os
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash

from ..base.fingerprints import fingerprint
from ..errors import InputError
from .loading import config_options, errors_of_loading, file_options, find_files, load_model, load_tokenizer


_WHAT = "the reference model"

# Options of `from_pretrained` without effect on a model's output: where it comes from (its version is compared), where
# it is placed
_NOT_IN_OUTPUT = (
    "cache_dir", "device_map", "force_download", "local_files_only", "max_memory", "offload_buffers",
    "offload_folder", "revision", "token",
)  # fmt: skip


def load_reference_model(model: str, model_init_kwargs: dict | None = None) -> PreTrainedModel | PeftModel:
    """
    Load a causal language model, or a PEFT adapter on its base model, for scoring: evaluation mode, no gradients, on
    this process's device unless `device_map` places it. `dtype` defaults to bfloat16 on an accelerator, float32 on the
    CPU; for `revision` see [`~hf_sft_variants.scoring.loading.find_files`]. Raises an `InputError` under DeepSpeed
    ZeRO-3.
    """
    refuse_zero3(model)
    options = _with_default_dtype(model_init_kwargs)
    return load_model(model, options, PartialState().device, what=_WHAT).requires_grad_(False)


def refuse_zero3(model: str) -> None:
    """Refuse to load a scoring model under DeepSpeed ZeRO-3, which would partition its weights."""
    if is_deepspeed_zero3_enabled():
        raise InputError(
            f"The model {model!r} has to score, but can't be loaded under DeepSpeed ZeRO-3. Run `hf-sft-variants "
            "score --config RECIPE` first, without DeepSpeed; training then finds the scores."
        )


def load_reference_tokenizer(model: str, model_init_kwargs: dict | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a reference model; see [`~hf_sft_variants.scoring.loading.load_tokenizer`]."""
    return load_tokenizer(model, model_init_kwargs, what=_WHAT)


def require_same_vocabulary(
    model: str, tokenizer: PreTrainedTokenizerBase, model_init_kwargs: dict | None = None
) -> None:
    """
    Refuse a reference model whose vocabulary differs from that of `tokenizer`, the trained model's: it is to score the
    same tokens.
    """
    ours, theirs = tokenizer.get_vocab(), load_reference_tokenizer(model, model_init_kwargs).get_vocab()
    if ours != theirs:
        different = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
        raise InputError(
            f"The reference model {model!r} has another vocabulary than the trained model: {len(theirs)} tokens "
            f"against {len(ours)}, the first difference is {different[0]!r}. Tokens, unlike messages, can be scored "
            "only by a model of the same family; choose one."
        )


def max_positions(model: str, model_init_kwargs: dict | None = None) -> int | None:
    """
    Maximum number of tokens that a reference model can read, by its configuration; `None` without a limit. The virtual
    tokens of prompt learning are subtracted.
    """
    files = find_files(model, model_init_kwargs, what=_WHAT)
    config = AutoConfig.from_pretrained(files.model, **config_options(files.options))
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    adapter = files.adapter_config
    if limit is None or adapter is None or not adapter.is_prompt_learning:
        return limit
    return limit - adapter.num_virtual_tokens


def identify_model(model: str, model_init_kwargs: dict | None = None) -> dict[str, str]:
    """
    Identity of a scoring model as JSON values, used as its cache key: a folder's content
    ([`~hf_sft_variants.base.fingerprints.fingerprint`]), wherever it is, or the commit of an id on the Hub; for an
    adapter, also its base model's. Options that change the output count, the default `dtype` among them.
    """
    options = _with_default_dtype(model_init_kwargs)
    # As texts: `dtype` may be given as either. Without the token, which is a secret: the values are written to files
    names = {
        name: str(value).removeprefix("torch.")
        for name, value in sorted(options.items())
        if name not in _NOT_IN_OUTPUT
    }
    files = find_files(model, options, what=_WHAT)
    with errors_of_loading(_WHAT, model):
        base = _identity(files.model, files.options, CONFIG_NAME)
        if files.adapter is None:
            return {**base, "options": str(names)}
        adapter = _identity(files.adapter, files.adapter_options, ADAPTER_CONFIG_NAME)
    return {**adapter, "base": " ".join(base.values()), "options": str(names)}


def describe_model(model: str, model_init_kwargs: dict | None = None) -> dict[str, str]:
    """
    Describe a model by its name, for readers, and its content, the only part that is compared
    ([`~hf_sft_variants.base.fingerprints.what_counts`]): the same wherever it is and in whatever dtype it is loaded.
    """
    identity = identify_model(model, model_init_kwargs)
    versions = [identity[name] for name in ("version", "base") if name in identity]
    return {"name": Path(model).name if os.path.isdir(model) else model, "content": " ".join(versions)}


def _with_default_dtype(model_init_kwargs: dict | None) -> dict:
    on_cpu = PartialState().device.type == "cpu"
    return {"dtype": torch.float32 if on_cpu else torch.bfloat16, **(model_init_kwargs or {})}


def _identity(name: str, options: dict, config_file: str) -> dict[str, str]:
    if os.path.isdir(name):
        return {"version": fingerprint(Path(name, options.get("subfolder", "")))}
    file = cached_file(name, config_file, **file_options(options))
    return {"model": name, "version": str(extract_commit_hash(file, None))}  # which is part of the path
