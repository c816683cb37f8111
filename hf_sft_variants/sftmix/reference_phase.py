"""The first phase of SFTMix: a reference model is trained, and asked about the training data as it learns."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model, release_memory
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTConfig, SFTTrainer

from ..base.checkpoints import RUN_FILE, last_checkpoint, require_same_run, write_run
from ..errors import InputError
from ..scoring import EXAMPLE_KEY, require_same_vocabulary
from .confidence import ConfidenceTrackingCallback


if TYPE_CHECKING:
    from .trainer import SFTMixTrainer


logger = get_logger(__name__)


class ReferencePhase:
    """
    Trains the reference model of an [`SFTMixTrainer`] by ordinary supervised fine-tuning and measures its confidence.

    A plain [`~trl.SFTTrainer`] gets the trainer's own arguments: the same start (the model is loaded again by its
    name, or copied if it was passed as an object), data, seed and adapter; or another model, `reference_model`. It
    reports to no tracker, pushes nothing, and has none of the user's callbacks. The trained model is kept in
    `<output_dir>/reference` with its checkpoints, then comes `confidence.parquet`: where that is, the phase is over.

    Meanwhile the model that waits for its turn stands on the CPU, unless it is quantized or split over devices.

    Args:
        arguments (`dict[str, Any]`):
            What the [`SFTMixTrainer`] was made with, by name, before anything was done with it.
    """

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments
        self.peft_config = copy.deepcopy(arguments.get("peft_config"))  # `SFTTrainer` changes the user's

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

    def run(self, trainer: "SFTMixTrainer", resume: bool) -> Path:
        """
        Train the reference, unless that was done before; to be called by all processes at once.

        Args:
            trainer ([`SFTMixTrainer`]):
                Trainer whose arguments the phase has.
            resume (`bool`):
                Whether to go on from the reference's last checkpoint, if there is one.

        Returns:
            `Path`: The confidence file.

        Raises:
            `InputError`: If it is of another reference.
        """
        path = reference_folder(trainer.args) / "confidence.parquet"
        description = self._describe(trainer.args)
        if (path.is_file() or resume) and (path.parent / RUN_FILE).is_file():
            require_same_run(path.parent, description, "or remove the folder to train the reference again.")
        if all(gather_object([path.is_file()])):
            logger.warning(f"The confidence in {path} is used. Remove its folder to train the reference again.")
            return path
        logger.info(f"SFTMix, first phase: the reference model is trained, {path.parent}.")
        if trainer.is_world_process_zero():
            write_run(path.parent, description)
        with _on_the_cpu(trainer):
            self._train(trainer, path, resume)
            release_memory()
        return path

    @staticmethod
    def _describe(args) -> dict[str, Any]:
        settings = {"reference_model": args.reference_model, "confidence_checkpoints": args.confidence_checkpoints}
        return {"trainer": "SFTMixTrainer", "settings": settings, "examples": None}

    def _train(self, trainer, path, resume) -> None:
        rows = self._keyed_rows(trainer)
        own = {"args": _reference_args(trainer.args), "train_dataset": rows, "callbacks": None}
        reference = SFTTrainer(**{**self.arguments, **self._start(trainer), **own})
        reference.add_callback(_SaveModelCallback(reference))
        tracking = ConfidenceTrackingCallback(
            reference,
            path,
            trainer.args.confidence_checkpoints,
            trainer.args.confidence_measure,
            dataset=self._unpacked_examples(reference, rows) if reference.args.packing else None,
        )
        reference.add_callback(tracking)
        reference.train(resume_from_checkpoint=last_checkpoint(path.parent) if resume else None)

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
        formatting_func = self.arguments.get("formatting_func")
        return reference._prepare_dataset(rows, reference.processing_class, args, False, formatting_func, "train")


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


def _reference_args(args: SFTConfig) -> SFTConfig:
    args = copy.copy(args)  # not made anew, which would replace the global configuration of DeepSpeed
    args.output_dir = str(reference_folder(args))
    args.push_to_hub = False
    args.hub_model_id = None
    args.load_best_model_at_end, args.metric_for_best_model = False, None  # which may be a metric of the method
    args.report_to = []
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
