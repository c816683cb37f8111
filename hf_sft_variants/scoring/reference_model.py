"""Reference models: loaded to be asked, never trained."""

import hashlib
import os
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash

from ..errors import InputError


# Options of `from_pretrained` that say which files are read
_WHERE = ("cache_dir", "revision", "token")

_WEIGHT_FILES = {".safetensors", ".bin", ".json"}


def load_reference_model(model: str, model_init_kwargs: dict | None = None) -> PreTrainedModel | PeftModel:
    """
    Load a causal language model to score data with: evaluation mode, no gradients, on this process's device.

    Args:
        model (`str`):
            Model id or folder; a PEFT adapter is loaded on the base model it names.
        model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained`. `dtype` defaults to bfloat16 on an accelerator, float32 on the CPU;
            with `quantization_config` the model is put where it says. `revision` is that of an adapter, not of its
            base model.

    Raises:
        `InputError`: If the model can't be loaded or lacks weights, or under DeepSpeed ZeRO-3.
    """
    refuse_zero3(model)
    options = with_default_dtype(model_init_kwargs)
    try:
        adapter = _adapter_config(model, options)
        name = adapter.base_model_name_or_path if adapter else model
        base_options = _without_revision(options) if adapter else options
        loaded, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **base_options)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"The reference model {model!r} can't be loaded: {error} Give the id or the folder of a causal language "
            "model."
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"The reference model {model!r} lacks the weights {missing[:3]}, which would be random. Give a causal "
            "language model."
        )
    if "quantization_config" not in options:
        loaded = loaded.to(PartialState().device)
    if adapter:
        loaded = PeftModel.from_pretrained(loaded, model, revision=options.get("revision"))
    return loaded.eval().requires_grad_(False)


def refuse_zero3(model: str) -> None:
    """
    Refuse to load a model that scores under DeepSpeed ZeRO-3, which would take its weights apart and put them together
    only in training.

    Raises:
        `InputError`: Under ZeRO-3.
    """
    if is_deepspeed_zero3_enabled():
        raise InputError(
            f"The model {model!r} has to score, but can't be loaded under DeepSpeed ZeRO-3. Run `hf-sft-variants "
            "score --config RECIPE` first, without DeepSpeed; training then finds the scores."
        )


def load_reference_tokenizer(model: str, model_init_kwargs: dict | None = None) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of a reference model; an adapter without one of its own has its base model's.

    Args:
        model (`str`):
            Id or folder of a model or a PEFT adapter.
        model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained` for the model; those that name the version are used.

    Raises:
        `InputError`: If there is no tokenizer.
    """
    options = _config_options(model_init_kwargs or {})
    try:
        base_model = _base_model(model, options)
        try:
            return AutoTokenizer.from_pretrained(model, **options)
        except (OSError, ValueError):
            if base_model == model:
                raise
            return AutoTokenizer.from_pretrained(base_model)
    except (OSError, ValueError) as error:
        raise InputError(
            f"The reference model {model!r} has no tokenizer that can be loaded: {error} Save the tokenizer beside "
            "the model."
        ) from error


def require_same_vocabulary(
    model: str, tokenizer: PreTrainedTokenizerBase, model_init_kwargs: dict | None = None
) -> None:
    """
    A reference model can score the trained model's tokens only if they are its own.

    Args:
        model (`str`):
            Id or folder of the reference model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The trained model's tokenizer.
        model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained` for the reference model.

    Raises:
        `InputError`: If the reference model's tokenizer has another vocabulary, or there is none.
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
    """Most tokens a reference model can read, by its configuration; `None` where that names no limit."""
    options = _config_options(model_init_kwargs or {})
    name = _base_model(model, options)
    config = AutoConfig.from_pretrained(name, **(options if name == model else {}))
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def with_default_dtype(model_init_kwargs: dict | None) -> dict:
    """Keyword arguments of `from_pretrained` with the `dtype` that a reference model has by default."""
    on_cpu = PartialState().device.type == "cpu"
    return {"dtype": torch.float32 if on_cpu else torch.bfloat16, **(model_init_kwargs or {})}


def _adapter_config(model: str, options: dict) -> PeftConfig | None:
    """Configuration of an adapter; `None` for a model of its own."""
    if os.path.isdir(model):
        is_adapter = os.path.isfile(os.path.join(model, "adapter_config.json"))
        return PeftConfig.from_pretrained(model) if is_adapter else None
    try:
        AutoConfig.from_pretrained(model, **_config_options(options))
    except OSError:  # an adapter's repository has no config.json
        return PeftConfig.from_pretrained(model, revision=options.get("revision"))
    return None


def _base_model(model: str, options: dict) -> str:
    adapter = _adapter_config(model, options)
    return adapter.base_model_name_or_path if adapter else model


def _without_revision(options: dict) -> dict:
    return {name: value for name, value in options.items() if name != "revision"}


def _config_options(options: dict) -> dict:
    return {name: options[name] for name in ("revision", "trust_remote_code", "subfolder") if name in options}


def identify_model(model: str | PreTrainedModel, model_init_kwargs: dict | None = None) -> dict[str, str]:
    """
    What tells a model from others and from itself after training, as JSON values: its scores may be used again only
    where all of this is the same.

    A folder is known by its files' names, sizes and times of change; an id of the Hub by its commit; an adapter by
    itself and its base model; a loaded model by a hash of its parameters. The default `dtype` is among the options.
    """
    options = with_default_dtype(model_init_kwargs)
    # `dtype` may be a text, and trackers make it one; the token is a secret, and these values stand in files
    names = {name: str(value).removeprefix("torch.") for name, value in sorted(options.items()) if name != "token"}
    described = {"options": str(names)}
    if not isinstance(model, str):
        return {"model": type(model).__name__, "version": _hash_of_parameters(model), **described}
    adapter = _adapter_config(model, options)
    if adapter:
        base = identify_model(adapter.base_model_name_or_path, _without_revision(options))
        described["base"] = f"{base['model']} {base['version']}"
    return {"model": _location(model), "version": _version(model, options, adapter), **described}


def describe_model(model: str, model_init_kwargs: dict | None = None) -> dict[str, str]:
    """
    A model by its name, for people, and by its version, wherever it is and whatever numbers it computes in. The latter
    is what [`~hf_sft_variants.base.fingerprints.what_counts`].
    """
    identity = identify_model(model, model_init_kwargs)
    versions = [identity[name] for name in ("version", "base") if name in identity]
    return {"name": Path(model).name if os.path.isdir(model) else model, "content": " ".join(versions)}


def _location(model: str) -> str:
    return str(Path(model).resolve()) if os.path.isdir(model) else model


def _version(model: str, options: dict, adapter: PeftConfig | None) -> str:
    if os.path.isdir(model):
        folder = Path(model, options.get("subfolder", ""))
        files = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHT_FILES)
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr(states).encode()).hexdigest()[:16]
    name, where = (ADAPTER_CONFIG_NAME, _WHERE) if adapter else (CONFIG_NAME, (*_WHERE, "subfolder"))
    file = cached_file(model, name, **{option: options[option] for option in where if option in options})
    return str(extract_commit_hash(file, None))  # which is part of the path


def _hash_of_parameters(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
