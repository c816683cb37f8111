"""Loads causal language models, and PEFT adapters with their base models, for scoring and generation."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import cached_file, find_adapter_config_file

from ..errors import InputError, first_line


logger = get_logger(__name__)

# Options of `from_pretrained` that select the files to read
_FILES = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
# Options of `from_pretrained` that determine where the model is placed
_PLACES = ("device_map", "tp_plan", "distributed_config")

# What transformers, PEFT and bitsandbytes raise for files and options that can't be used
_LOADING_ERRORS = (
    OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, EOFError,
    SafetensorError, UnpicklingError, UserWarning,
)  # fmt: skip
_FIX = (
    "Pass the folder of a causal language model or of a PEFT adapter, or an id on the Hub; for an adapter, its base "
    "model must be where its adapter_config.json says."
)


@dataclass(frozen=True)
class ModelFiles:
    """
    Ids or folders of a model and of its adapter, if any; `model` is then the adapter's base model. `options` are all
    keyword arguments of `from_pretrained` for the model, `adapter_options` only those that select the adapter's files.
    """

    model: str
    options: dict[str, Any]
    adapter: str | None = None
    adapter_options: dict[str, Any] = field(default_factory=dict)
    adapter_config: PeftConfig | None = None


def find_files(
    model: str, options: dict[str, Any] | None = None, adapter: str | None = None, what: str = "`model`"
) -> ModelFiles:
    """
    Locate a model and, if it is an adapter, its base model. Takes the arguments of [`load_model`].

    `revision` refers to `model`. If `model` is the folder of an adapter, which has no revision, it refers to the base
    model instead. The base model's revision defaults to the one saved in the adapter's configuration.
    """
    options = dict(options or {})
    where = file_options(options)
    if adapter is not None:
        where = {name: value for name, value in where.items() if name not in ("revision", "subfolder")}
    name = model if adapter is None else adapter
    with errors_of_loading(what if adapter is None else "`adapter`", name):
        if find_adapter_config_file(name, **where) is None:
            if adapter is not None:
                raise InputError("it has no adapter_config.json")
            return ModelFiles(model, options)
        config = PeftConfig.from_pretrained(name, **where)
        if adapter is None and config.base_model_name_or_path is None:
            raise InputError("its adapter_config.json does not name a base model")
    revision = options.get("revision")
    if adapter is None:
        options.pop("subfolder", None)
        model, revision = config.base_model_name_or_path, revision if os.path.isdir(name) else None
    if model == config.base_model_name_or_path:
        revision = revision or config.revision
    return ModelFiles(model, {**options, "revision": revision}, name, where, config)


def load_model(
    model: str,
    options: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    adapter: str | None = None,
    what: str = "`model`",
) -> PreTrainedModel | PeftModel:
    """
    Load a causal language model in evaluation mode.

    If `model` is an adapter, it is loaded on top of its base model; `adapter` is loaded on top of `model`. `options`
    are keyword arguments of `from_pretrained`; for `revision` see [`find_files`], and those that place the model, such
    as `device_map`, take precedence over `device`. `what` names the model in error messages. Raises an `InputError` if
    the model or the adapter can't be loaded, or lacks weights.
    """
    files = find_files(model, options, adapter, what)
    options = files.options
    if all(options.get(name) is None for name in _PLACES):
        options = {**options, "device_map": {"": device}}
    with errors_of_loading(what, model):
        loaded, info = AutoModelForCausalLM.from_pretrained(files.model, output_loading_info=True, **options)
        if info["missing_keys"]:
            raise InputError(f"it lacks the weights {sorted(info['missing_keys'])[:3]}, which would be random")
    if files.adapter is not None:
        with errors_of_loading(what if adapter is None else "`adapter`", files.adapter):
            loaded = _with_adapter(loaded, files.adapter, files)
    return loaded.eval()


def load_tokenizer(
    model: str, options: dict[str, Any] | None = None, adapter: str | None = None, what: str = "`model`"
) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of an adapter, if it has its own, or else of the model. Takes the arguments of [`load_model`].
    """
    files = find_files(model, options, adapter, what)
    with errors_of_loading(f"the tokenizer of {what}", model):
        tokenizer = _adapter_tokenizer(files)
        return tokenizer or AutoTokenizer.from_pretrained(files.model, **config_options(files.options))


def file_options(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that select the files to read."""
    return {name: options[name] for name in _FILES if name in options}


def config_options(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that configurations and tokenizers also accept."""
    return {name: options[name] for name in (*_FILES, "trust_remote_code") if name in options}


@contextmanager
def errors_of_loading(what: str, name: str) -> Iterator[None]:
    """Convert the exceptions that libraries raise for a model that can't be loaded to `InputError`."""
    try:
        yield
    except _LOADING_ERRORS as error:
        what = what[0].upper() + what[1:]
        raise InputError(f"{what} {name!r} can't be loaded: {first_line(error).rstrip('.')}. {_FIX}") from error


def _with_adapter(model: PreTrainedModel, adapter: str, files: ModelFiles) -> PeftModel:
    folder = Path(adapter, files.adapter_options.get("subfolder", ""))
    # Without weights in the folder, PEFT would look up its name on the Hub
    if folder.is_dir() and not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise InputError(f"it has no {SAFETENSORS_WEIGHTS_NAME}")
    if any(parameter.is_meta for parameter in model.parameters()):
        # PEFT would dispatch it again and write the offloaded weights to the base model's own files
        raise InputError("its base model is offloaded: merge the adapter into it, or use another `device_map`")
    _resize_embeddings(model, files)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # those weights would be random
        return PeftModel.from_pretrained(model, adapter, torch_device="cpu", **files.adapter_options)


def _resize_embeddings(model: PreTrainedModel, files: ModelFiles) -> None:
    """Resize the base model's embeddings to match the adapter's or, as PEFT does, the adapter's tokenizer."""
    embeddings = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    (name,) = (name for name, module in model.named_modules() if module is embeddings)
    weights = load_peft_weights(files.adapter, device="cpu", **files.adapter_options)
    whole = re.compile(rf"\.{re.escape(name)}(\.token_adapter|\.base_layer|\.modules_to_save)*\.weight$")
    new_size = next((len(value) for key, value in weights.items() if whole.search(key)), None)
    if new_size is None:
        new_size = max(len(_adapter_tokenizer(files) or ()), size)
        if new_size > size:
            logger.warning(
                f"The tokenizer of the adapter {files.adapter!r} has {new_size} tokens and its base model {size} "
                "embeddings, but the adapter has no embeddings: those of the new tokens are random."
            )
    if new_size != size:
        model.resize_token_embeddings(new_size)


def _adapter_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer saved with an adapter, if any."""
    quietly = ("missing_entries", "connection_errors", "gated_repo")
    where = {**files.adapter_options, **{f"_raise_exceptions_for_{name}": False for name in quietly}}
    if files.adapter is None or cached_file(files.adapter, TOKENIZER_CONFIG_FILE, **where) is None:
        return None
    trust_remote_code = files.options.get("trust_remote_code", False)
    return AutoTokenizer.from_pretrained(files.adapter, trust_remote_code=trust_remote_code, **files.adapter_options)
