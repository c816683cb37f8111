"""The first phase of SFTMix: a reference model is trained, and asked about the training data as it learns."""

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model, release_memory
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import sort_checkpoints
from trl import SFTConfig, SFTTrainer

from ..base.checkpoints import last_checkpoint
from ..base.example_keys import EXAMPLE_KEY
from ..base.processes import on_main_process
from ..errors import InputError
from ..scoring import require_same_vocabulary
from .confidence import ConfidenceTrackingCallback
from .config import SFTMixConfig
from .reference_settings import describe_reference, describe_start, require_same_reference


if TYPE_CHECKING:
    from .trainer import SFTMixTrainer


logger = get_logger(__name__)

_CONFIDENCE, _SETTINGS_OF_RUN = "confidence.parquet", "settings.json"


class ReferencePhase:
    """
    Trains the reference model of an [`SFTMixTrainer`] by ordinary supervised fine-tuning and measures its confidence.

    A plain [`~trl.SFTTrainer`] gets the trainer's own arguments: the same start (the model is loaded again by its
    name, or copied if it was passed as an object), data, seed and adapter; or another model, `reference_model`. It
    reports to no tracker, pushes nothing, and has none of the user's callbacks. The trained model is kept in
    `<output_dir>/reference`, its checkpoints as long as it is trained; then comes `confidence.parquet`: where that is,
    the phase is over. Of the folder nothing goes to the Hub but what `push_confidence` asks for.

    Meanwhile the model that waits for its turn stands on the CPU, unless it is quantized or split over devices.

    Args:
        arguments (`dict[str, Any]`):
            What the [`SFTMixTrainer`] was made with, by name, before anything was done with it.
    """

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments
        self.peft_config = copy.deepcopy(arguments.get("peft_config"))  # `SFTTrainer` changes the user's
        self.start: dict[str, Any] | None = None

    def check(self, trainer: "SFTMixTrainer") -> None:
        """
        Refuse beforehand what the phase could not do.

        Raises:
            `InputError`: If the trainer brings an optimizer, a model that can't be copied, or tokens that the
                reference model does not know.
        """
        model, name = self.arguments["model"], trainer.args.reference_model
        if trainer.optimizer is not None or trainer.lr_scheduler is not None:
            raise InputError(
                "`optimizers` belong to the model that is trained, and the reference model needs its own. Use `optim` "
                "or `optimizer_cls_and_kwargs`, or `confidence_source='file'`."
            )
        is_sharded = is_deepspeed_zero3_enabled() or any(isinstance(p, DTensor) for p in trainer.model.parameters())
        if is_sharded and not isinstance(name or model, str):
            raise InputError(
                f"`model` is a {type(model).__name__} whose weights are sharded, which can't be copied for the "
                "reference. Pass the model's id or path, or `confidence_source='file'`."
            )
        if name is not None and "input_ids" in self.arguments["train_dataset"].column_names:
            require_same_vocabulary(name, trainer.processing_class, trainer.args.model_init_kwargs)

    def run(self, trainer: "SFTMixTrainer", resume: bool, checkpoint: str | None) -> Path:
        """
        Train the reference, unless that was done before; to be called by all processes at once. What is on disk counts
        where the main process sees it: other machines may have a folder of their own.

        Args:
            trainer ([`SFTMixTrainer`]):
                Trainer whose arguments the phase has.
            resume (`bool`):
                Whether to go on from the reference's last checkpoint, if there is one.
            checkpoint (`str`, *optional*):
                Checkpoint of mixup that the run goes on from, if there is one.

        Returns:
            `Path`: The confidence file.

        Raises:
            `InputError`: If it was done, or begun, before with other settings or other data.
        """
        path = reference_folder(trainer.args) / _CONFIDENCE
        settings_path, settings = path.with_name(_SETTINGS_OF_RUN), self._describe(trainer)
        is_done = on_main_process(path.is_file)
        goes_on = resume and on_main_process(settings_path.is_file)
        # A checkpoint of mixup says itself what it depends on
        if (checkpoint is None) if is_done else goes_on:
            on_main_process(partial(require_same_reference, settings_path, settings, path))
        if is_done:
            logger.warning(f"The confidence in {path} is used. Remove its folder to train the reference again.")
            _remove_checkpoints(trainer, path.parent)
            return path
        if trainer.is_world_process_zero():
            path.parent.mkdir(parents=True, exist_ok=True)
            settings_path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        logger.info(f"SFTMix, first phase: the reference model is trained, {path.parent}.")
        with _on_the_cpu(trainer):
            self._train(trainer, path, resume)
            release_memory()
        _remove_checkpoints(trainer, path.parent)
        return path

    def _train(self, trainer, path, resume) -> None:
        rows = self._keyed_rows(trainer)
        arguments = {
            **self.arguments,
            **self._start(trainer),
            "train_dataset": rows,
            "callbacks": None,
            "formatting_func": self._formatting_func(),
        }
        arguments["args"] = _reference_args(trainer.args, loads_model=isinstance(arguments["model"], str))
        reference = ReferenceTrainer(**arguments)
        _cast_as(trainer.model, reference.model)
        reference.add_callback(_SaveModelCallback(reference))
        tracking = ConfidenceTrackingCallback(
            reference,
            path,
            trainer.args.confidence_checkpoints,
            trainer.args.confidence_measure,
            dataset=self._unpacked_examples(reference, rows) if reference.args.packing else None,
        )
        tracking.own_keys_are_unique = EXAMPLE_KEY in self.arguments["train_dataset"].column_names
        reference.add_callback(tracking)
        reference.train(
            resume_from_checkpoint=on_main_process(partial(last_checkpoint, path.parent)) if resume else None
        )

    def _start(self, trainer) -> dict[str, Any]:
        """The model to begin with, and the arguments that go with it."""
        if trainer.args.reference_model is not None:
            model = trainer.args.reference_model
            return {"model": model, "peft_config": self.peft_config, "processing_class": None}
        if isinstance(self.arguments["model"], str):
            return {"peft_config": self.peft_config}
        model = copy.deepcopy(trainer.model)
        base_model = model.get_base_model() if is_peft_model(model) else model
        vars(base_model).pop("forward")  # its fused LM head calls the forward of the model it was copied from
        return {"model": model, "peft_config": None, "quantization_config": None}

    def _keyed_rows(self, trainer) -> Dataset:
        """The raw rows, with the keys that the trainer knows them by, whatever the reference's tokenizer adds."""
        rows = self.arguments["train_dataset"].with_format(None)
        if EXAMPLE_KEY in rows.column_names:
            return rows
        return rows.add_column(EXAMPLE_KEY, trainer.example_keys)

    def _unpacked_examples(self, reference, rows) -> Dataset:
        args = copy.copy(reference.args)
        args.truncation_mode = "keep_start"  # as packing does
        tokenizer, formatting_func = reference.processing_class, self._formatting_func()
        return reference._prepare_dataset(rows, tokenizer, args, False, formatting_func, "train")

    def _formatting_func(self) -> Callable[[dict], str] | None:
        """The user's function, which must not see the keys that [`_keyed_rows`] has added."""
        function = self.arguments.get("formatting_func")
        if function is None or EXAMPLE_KEY in self.arguments["train_dataset"].column_names:
            return function
        return partial(_format_without_key, function)

    def _describe(self, trainer) -> dict[str, Any]:
        """What tells this reference from another one in the same folder."""
        if self.start is None:  # a second `train()` finds the model trained
            self.start = describe_start(trainer, self.arguments["model"])
        return describe_reference(trainer, self.arguments, self.peft_config, self.start)


def _format_without_key(function: Callable[[dict], str], row: dict) -> str:
    return function({name: value for name, value in row.items() if name != EXAMPLE_KEY})


def _cast_as(model, reference) -> None:
    """Give the reference the dtypes of the model that waits, whose adapter may be float32 by the user's will."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad and dtypes.get(name, parameter.dtype) != parameter.dtype:
            parameter.data = parameter.data.to(dtypes[name])


class ReferenceTrainer(SFTTrainer):
    """A plain `SFTTrainer` beside another trainer that has set up DeepSpeed."""

    def _build_accelerator_args(self, **kwargs):
        # Accelerate takes DeepSpeed's plugin from the trainer that waits, and refuses to be given it again
        return {**super()._build_accelerator_args(**kwargs), "deepspeed_plugin": None}


def _remove_checkpoints(trainer: "SFTMixTrainer", folder: Path) -> None:
    """Those of a reference that is trained; one that was killed in between has left them."""
    if trainer.is_world_process_zero():
        for checkpoint in sort_checkpoints(str(folder)):
            shutil.rmtree(checkpoint)


class _SaveModelCallback(TrainerCallback):
    """Saves the model as soon as it is trained: a phase that is over has left its model."""

    def __init__(self, trainer: SFTTrainer):
        self.trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.save_model()
        self.trainer.save_state()


def reference_folder(args: SFTConfig) -> Path:
    """Where the reference model of a run is kept."""
    return Path(args.output_dir) / "reference"


def not_pushed(args: SFTMixConfig) -> list[str]:
    """What of the reference stays here when `output_dir` goes to the Hub, as patterns."""
    folder, pushed = reference_folder(args), (_CONFIDENCE, _SETTINGS_OF_RUN) if args.push_confidence else ()
    here = [path for path in folder.glob("*") if path.name not in pushed]
    return [f"{folder.name}/{path.name}{'/' if path.is_dir() else ''}" for path in here]


def _reference_args(args: SFTConfig, loads_model: bool) -> SFTConfig:
    args = copy.copy(args)  # not made anew, which would replace the global configuration of DeepSpeed
    args.output_dir = str(reference_folder(args))
    args.push_to_hub = False
    args.hub_model_id = None
    args.report_to = []
    if loads_model and args.world_size > 1:
        # Beside a trainer that has set up FSDP, `SFTTrainer` would let each process spread its model over all devices
        args.model_init_kwargs = {**(args.model_init_kwargs or {}), "device_map": None}
    if args.metric_for_best_model is not None:  # `SFTTrainer` knows the next-token loss as its loss alone
        args.metric_for_best_model = re.sub("nll$", "loss", args.metric_for_best_model)
    return args


@contextmanager
def _on_the_cpu(trainer: "SFTMixTrainer") -> Iterator[None]:
    """Let the model that waits make room on the accelerator, where moving it is simple."""
    is_quantized = getattr(trainer.model, "quantization_method", None) is not None
    moves = trainer.place_model_on_device and trainer.args.device.type != "cpu" and not is_quantized
    if moves:
        trainer.model.to("cpu")
        release_memory()
    try:
        yield
    finally:
        if moves:
            trainer._move_model_to_device(trainer.model, trainer.args.device)
