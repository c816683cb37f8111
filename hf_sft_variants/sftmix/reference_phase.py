"""First phase of SFTMix: trains a reference model and measures its confidence."""

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model, release_memory
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import sort_checkpoints
from trl import SFTConfig, SFTTrainer

from ..base import AnnotatedSFTTrainer
from ..base.checkpoints import last_checkpoint
from ..base.example_keys import EXAMPLE_KEY
from ..base.processes import on_main_process
from ..errors import InputError
from ..scoring import require_same_vocabulary
from .confidence import ConfidenceTrackingCallback, refuse_tensor_parallelism
from .config import SFTMixConfig
from .reference_settings import describe_reference, describe_start, require_same_reference


logger = get_logger(__name__)

_CONFIDENCE_FILE, _SETTINGS_FILE = "confidence.parquet", "settings.json"


class ReferencePhase:
    """
    Trains the reference model of an [`SFTMixTrainer`] by ordinary supervised fine-tuning and measures its confidence.

    It runs a plain [`~trl.SFTTrainer`] with the arguments passed to the trainer: the same data, seed, adapter and
    initial model (reloaded by name, or copied if it was passed as an object), or `reference_model` instead of the
    latter. There are no trackers or user callbacks, and nothing is pushed. The trained model is saved to
    `<output_dir>/reference`; its checkpoints are removed once training has finished. `confidence.parquet` is written
    last and marks the end of the phase. In the meantime, the model for the second phase is moved to the CPU, unless it
    is quantized or split over devices.
    """

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments
        self.peft_config = copy.deepcopy(arguments.get("peft_config"))  # `SFTTrainer` modifies the user's object
        self.start: dict[str, Any] | None = None

    def check(self, trainer: AnnotatedSFTTrainer) -> None:
        """Refuse early what would only fail once the reference model is loaded."""
        refuse_tensor_parallelism(trainer)
        model, name = self.arguments["model"], trainer.args.reference_model
        if trainer.optimizer is not None or trainer.lr_scheduler is not None:
            raise InputError(
                "`optimizers` are tied to the model to train, but the reference model needs its own. Use `optim` or "
                "`optimizer_cls_and_kwargs`, or `confidence_source='file'`."
            )
        is_sharded = is_deepspeed_zero3_enabled() or any(isinstance(p, DTensor) for p in trainer.model.parameters())
        if is_sharded and not isinstance(name or model, str):
            raise InputError(
                f"`model` is a {type(model).__name__} with sharded weights, which can't be copied for the reference. "
                "Pass the model's id or path, or use `confidence_source='file'`."
            )
        if name is not None and "input_ids" in self.arguments["train_dataset"].column_names:
            require_same_vocabulary(name, trainer.processing_class, trainer.args.model_init_kwargs)

    def run(self, trainer: AnnotatedSFTTrainer, resume: bool, checkpoint: str | None) -> Path:
        """
        Train the reference unless this has already been done, and return its confidence file. With `resume`, training
        continues from the reference's last checkpoint, if there is one. `checkpoint` is the checkpoint of the second
        phase that the run resumes from, if any. Must be called by all processes together; only the main process's
        files decide, because other machines may have separate folders. Raises an `InputError` if the reference in the
        folder was trained with different settings or data.
        """
        if self.start is None:  # at a second `train()`, the model has already been trained
            self.start = describe_start(trainer, self.arguments["model"])
        settings = describe_reference(trainer, self.arguments, self.peft_config, self.start)
        folder = reference_folder(trainer.args)
        path, settings_path = folder / _CONFIDENCE_FILE, folder / _SETTINGS_FILE
        is_done = on_main_process(path.is_file)
        # A checkpoint of the second phase has its own check
        if checkpoint is None if is_done else resume and on_main_process(settings_path.is_file):
            on_main_process(partial(require_same_reference, settings_path, settings))
        if is_done:
            logger.warning(f"Using the confidence in {path}. Remove its folder to train the reference again.")
        else:
            if trainer.is_world_process_zero():
                folder.mkdir(parents=True, exist_ok=True)
                settings_path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            logger.info(f"First of two phases: training the reference model in {folder}.")
            with _on_the_cpu(trainer):
                self._train(trainer, path, resume)
                release_memory()
        if trainer.is_world_process_zero():
            for leftover in sort_checkpoints(str(folder)):
                shutil.rmtree(leftover)
        return path

    def _train(self, trainer: AnnotatedSFTTrainer, path: Path, resume: bool) -> None:
        rows = self.arguments["train_dataset"].with_format(None)
        formatting_func = self.arguments.get("formatting_func")
        if EXAMPLE_KEY not in rows.column_names:
            # Uses the trainer's keys, since the reference's tokenizer may end texts differently
            rows = rows.add_column(EXAMPLE_KEY, trainer.example_keys)
            formatting_func = formatting_func and partial(_format_without_key, formatting_func)
        arguments = {**self.arguments, **self._start(trainer)}
        args = _reference_args(trainer.args, loads_model=isinstance(arguments["model"], str))
        others = {"args": args, "train_dataset": rows, "callbacks": None, "formatting_func": formatting_func}
        reference = ReferenceTrainer(**{**arguments, **others})
        _cast_as(trainer.model, reference.model)
        examples = reference.train_dataset
        if args.packing:
            unpacked = copy.copy(args)
            unpacked.truncation_mode = "keep_start"  # as packing does
            tokenizer = reference.processing_class
            examples = reference._prepare_dataset(rows, tokenizer, unpacked, False, formatting_func, "train")
        checkpoints, measure = trainer.args.confidence_checkpoints, trainer.args.confidence_measure
        reference.add_callback(_SavingCallback(reference, path, checkpoints, measure, examples))
        reference.train(
            resume_from_checkpoint=on_main_process(partial(last_checkpoint, path.parent)) if resume else None
        )

    def _start(self, trainer: AnnotatedSFTTrainer) -> dict[str, Any]:
        """Return the initial model and the arguments that depend on it."""
        if trainer.args.reference_model is not None:
            model = trainer.args.reference_model
            return {"model": model, "peft_config": self.peft_config, "processing_class": None}
        if isinstance(self.arguments["model"], str):
            return {"peft_config": self.peft_config}
        model = copy.deepcopy(trainer.model)
        base_model = model.get_base_model() if is_peft_model(model) else model
        vars(base_model).pop("forward")  # [`add_lm_head`]'s, which would call that of the original model
        return {"model": model, "peft_config": None, "quantization_config": None}


class ReferenceTrainer(SFTTrainer):
    """Plain `SFTTrainer` that can be created after another trainer has set up DeepSpeed."""

    def _build_accelerator_args(self, **kwargs):
        # Accelerate takes the DeepSpeed plugin from the other trainer, and refuses a second one
        return {**super()._build_accelerator_args(**kwargs), "deepspeed_plugin": None}


class _SavingCallback(ConfidenceTrackingCallback):
    """Saves the trained model before the confidence file, which marks the end of the phase."""

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.save_model()
        self.trainer.save_state()
        super().on_train_end(args, state, control, **kwargs)


def reference_folder(args: SFTConfig) -> Path:
    """Return the folder of a run's reference model."""
    return Path(args.output_dir) / "reference"


def not_pushed(args: SFTMixConfig) -> list[str]:
    """Return patterns for the reference's files that are not pushed to the Hub with `output_dir`."""
    folder, pushed = reference_folder(args), (_CONFIDENCE_FILE, _SETTINGS_FILE) if args.push_confidence else ()
    kept = [path for path in folder.glob("*") if path.name not in pushed]
    return [f"{folder.name}/{path.name}{'/' if path.is_dir() else ''}" for path in kept]


def _reference_args(args: SFTConfig, loads_model: bool) -> SFTConfig:
    args = copy.copy(args)  # a new instance would replace DeepSpeed's global configuration
    args.output_dir = str(reference_folder(args))
    args.push_to_hub = False
    args.hub_model_id = None
    args.report_to = []
    if loads_model and args.world_size > 1:
        # With FSDP already set up by another trainer, each process would spread its model over all devices
        args.model_init_kwargs = {**(args.model_init_kwargs or {}), "device_map": None}
    if args.metric_for_best_model is not None:  # `SFTTrainer` only logs the NLL as its loss
        args.metric_for_best_model = re.sub("nll$", "loss", args.metric_for_best_model)
    return args


def _format_without_key(function: Callable[[dict], str], row: dict) -> str:
    return function({name: value for name, value in row.items() if name != EXAMPLE_KEY})


def _cast_as(model, reference) -> None:
    """Cast the reference to the dtypes of the trained model, whose adapter the user may have cast to float32."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad and name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])


@contextmanager
def _on_the_cpu(trainer: AnnotatedSFTTrainer) -> Iterator[None]:
    """Move the waiting model off the accelerator, unless it is quantized or split over devices."""
    is_quantized = getattr(trainer.model, "quantization_method", None) is not None
    moves = trainer.place_model_on_device and trainer.args.device.type != "cpu" and not is_quantized
    if moves:
        trainer.model.to("cpu")
        release_memory()
    try:
        yield
    finally:
        if moves:
            trainer.model.to(trainer.args.device)
