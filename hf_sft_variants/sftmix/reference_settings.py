"""Settings that SFTMix's reference depends on, recorded with its confidence and compared before it is reused."""

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftConfig
from transformers import PreTrainedModel

from ..base import AnnotatedSFTTrainer
from ..base.example_keys import EXAMPLE_KEY, add_content_keys
from ..base.field_checks import as_json_values
from ..base.fingerprints import fingerprint, vocabulary_hash
from ..base.trl_internals import global_then_local_main_first
from ..errors import InputError
from ..scoring import identify_model


# Prefixes of fields that are not compared: where and how the run is written, logged and evaluated, how processes read
# the data; settings of the second phase; and what is described below by its content
_NOT_COMPARED = (
    "output_dir", "logging_", "log_", "disable_tqdm", "report_to", "run_name", "project", "trackio_", "debug",
    "save_", "enable_jit_checkpoint", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "push_to_hub", "hub_", "do_", "eval_", "per_device_eval_batch_size", "prediction_loss_only", "include_",
    "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "resume_from_checkpoint", "ignore_data_skip",
    "restore_callback_states", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing", "dataloader_in_order", "dataset_num_proc", "ddp_",
    "local_rank", "skip_memory_metrics", "torch_empty_cache_steps",
    "mixup_", "ntp_weight", "confidence_split", "confidence_source", "confidence_file", "confidence_measure", "pair_",
    "push_confidence",
    "reference_model", "model_init_kwargs", "per_device_train_batch_size", "gradient_accumulation_steps",
)  # fmt: skip

# Fields that may name a file or a folder
_FILES = ("chat_template_path", "deepspeed")

# Values of a loaded model's tensor that are hashed: training changes them throughout
_SAMPLES = 4096


def describe_reference(
    trainer: AnnotatedSFTTrainer, arguments: dict[str, Any], peft_config: PeftConfig | None, start: dict[str, Any]
) -> dict[str, Any]:
    """
    Settings that a trainer's reference depends on, as JSON values without paths. `arguments` are those passed to the
    trainer, with `peft_config` as it was before its use; `start` is the initial model ([`describe_start`]).
    """
    args, tokenizer = trainer.args, trainer._tokenizer
    settings = {field.name: getattr(args, field.name) for field in fields(args)}
    settings = {name: value for name, value in settings.items() if not name.startswith(_NOT_COMPARED)}
    for name in _FILES:
        if isinstance(settings[name], str) and os.path.exists(settings[name]):
            settings[name] = fingerprint(settings[name])
    if peft_config is None and is_peft_model(trainer.model):
        peft_config = trainer.model.active_peft_config
    adapter = peft_config.to_dict() if peft_config else {}
    adapter.pop("base_model_name_or_path", None)  # part of `start`
    # Sets have another order in each process
    adapter = {name: sorted(value) if isinstance(value, set) else value for name, value in adapter.items()}
    quantization = arguments.get("quantization_config")
    optimizer_class, options = arguments.get("optimizer_cls_and_kwargs") or (None, None)
    with global_then_local_main_first():
        token_keys = add_content_keys(trainer.train_examples.select_columns(["input_ids", "labels"]))
    return as_json_values(
        {
            **settings,
            "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "adapter": bool(adapter),
            **{f"peft_config.{name}": value for name, value in adapter.items()},
            "quantization_config": quantization and quantization.to_dict(),
            "optimizer_cls_and_kwargs": optimizer_class and [optimizer_class.__qualname__, options],
            "vocabulary": vocabulary_hash(tokenizer),
            "chat_template": _hash(trainer.chat_template or tokenizer.chat_template),
            **start,  # after the adapter, which is part of a loaded model
            # Both: keys may be the user's own
            "examples": f"{len(trainer.example_keys)} with the hash {_hash(trainer.example_keys)}",
            "tokens": _hash(token_keys[EXAMPLE_KEY][:]),
        }
    )


def describe_start(trainer: AnnotatedSFTTrainer, model: str | PreTrainedModel) -> dict[str, Any]:
    """Initial model of the reference, by its content. Must be called before training."""
    name = trainer.args.reference_model or model
    if isinstance(name, str):
        identity = identify_model(name, trainer.args.model_init_kwargs)
    else:
        identity = {"version": _version_of_loaded(trainer.model)}
    return {f"model.{part}": value for part, value in identity.items()}


def _version_of_loaded(model: PreTrainedModel) -> str:
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest = hashlib.sha256(_hash(config).encode())
    for name, parameter in model.named_parameters():
        samples = parameter.detach().flatten()
        samples = samples[:: max(len(samples) // _SAMPLES, 1)].contiguous().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(samples.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def require_same_reference(path: Path, settings: dict[str, Any]) -> None:
    """Refuse a reference whose recorded settings, the file at `path`, differ from those that a run needs."""
    folder = path.parent
    fix = (
        "Remove the folder to train it again, choose another `output_dir`, or use this one with "
        f"`confidence_source='file'` and `confidence_file={str(folder / 'confidence.parquet')!r}`."
    )
    try:
        recorded = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"How the reference in {folder} was trained can't be read ({error!r}). {fix}") from error
    for name in {**settings, **recorded}:
        if settings.get(name) != recorded.get(name):
            raise InputError(
                f"{folder} has a reference that was trained with `{name}={recorded.get(name)!r}`, but now it is "
                f"{settings.get(name)!r}. {fix}"
            )
