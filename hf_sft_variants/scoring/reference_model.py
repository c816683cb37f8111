"""Reference models: loaded to be asked, never trained."""

import hashlib
import os
from pathlib import Path

import torch
from accelerate import PartialState
from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


# Parameters are compared by a sample of this many entries
_SAMPLED_ENTRIES = 1024


def load_reference_model(model: str, model_init_kwargs: dict | None = None) -> PreTrainedModel:
    """
    Load a causal language model to score data with: evaluation mode, no gradients, on this process's device.

    Args:
        model (`str`):
            Model id or folder; a folder with a PEFT adapter is loaded on the base model it names.
        model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained`. `dtype` defaults to bfloat16 on an accelerator, float32 on the CPU;
            with `quantization_config` the model is put where it says.

    Raises:
        `ValueError`: If the model can't be loaded, naming it.
    """
    device = PartialState().device
    model_init_kwargs = {
        "dtype": torch.float32 if device.type == "cpu" else torch.bfloat16,
        **(model_init_kwargs or {}),
    }
    is_adapter = os.path.isfile(os.path.join(model, "adapter_config.json"))
    auto_class = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    try:
        loaded = auto_class.from_pretrained(model, **model_init_kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The reference model {model!r} can't be loaded: {error} Give the id or the folder of a causal language "
            "model."
        ) from error
    if "quantization_config" not in model_init_kwargs:
        loaded = loaded.to(device)
    return loaded.eval().requires_grad_(False)


def identify_model(model: str | PreTrainedModel, model_init_kwargs: dict | None = None) -> dict[str, str]:
    """
    What tells a model from others and from itself after training, as JSON values: its scores may be used again only
    where all of this is the same.

    A folder is known by its files' names, sizes and times of change; an id of the Hub by its commit; a loaded model by
    a sample of every parameter.
    """
    options = {name: str(value) for name, value in sorted((model_init_kwargs or {}).items())}
    if not isinstance(model, str):
        return {"model": type(model).__name__, "version": _hash_of_parameters(model), "options": str(options)}
    if os.path.isdir(model):
        files = sorted(file for file in Path(model).iterdir() if file.suffix in {".safetensors", ".bin", ".json"})
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        version = hashlib.sha256(repr(states).encode()).hexdigest()[:16]
        return {"model": str(Path(model).resolve()), "version": version, "options": str(options)}
    revision = (model_init_kwargs or {}).get("revision")
    commit = AutoConfig.from_pretrained(model, revision=revision)._commit_hash
    return {"model": model, "version": str(commit), "options": str(options)}


def _hash_of_parameters(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(len(flat) // _SAMPLED_ENTRIES, 1)].cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
