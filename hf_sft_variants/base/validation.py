"""Argument validation before and after `SFTTrainer.__init__`."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch.nn import Module
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTConfig, SFTTrainer

from ..errors import InputError
from .preparation import named_sets
from .row_checks import require_embeddings, require_row
from .trl_internals import get_config_model_id, get_dataset_column_names


logger = get_logger(__name__)


def resolve_args(
    args: TrainingArguments | None, config_class: type[SFTConfig], model: str | PreTrainedModel, method_name: str
) -> SFTConfig:
    """
    Return `args` as the trainer's own configuration class: an `SFTConfig` or `TrainingArguments` is converted, and
    without `args` there are defaults, as in [`~trl.SFTTrainer`]. Raises an `InputError` for another method's
    configuration.
    """
    if args is None:
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        args = config_class(f"{model_id.split('/')[-1]}-{method_name}")
    elif not isinstance(args, config_class):
        if not issubclass(config_class, type(args)):
            raise InputError(
                f"`args` must be an `{config_class.__name__}` or an `SFTConfig` (the method's fields then have their "
                f"defaults), got `{type(args).__name__}`."
            )
        args = config_class(**{field.name: getattr(args, field.name) for field in fields(args) if field.init})
    # For streams accelerate would cut every tensor to the number of rows, those of padding-free batches too.
    # SFTTrainer sets this for a streaming training set only, not for a streaming evaluation set.
    if args.accelerator_config.dispatch_batches is None:
        args.accelerator_config.dispatch_batches = False
    return args


def refuse_unsupported(trainer_name: str, arguments: dict[str, Any]) -> None:
    """
    Refuse arguments that need a loss other than the trainer's own, data that it can't annotate, and invalid values.
    Called before data sets are prepared, which may take hours.
    """
    args, model, peft_config = arguments["args"], arguments["model"], arguments.get("peft_config")
    train_dataset, eval_dataset = arguments.get("train_dataset"), arguments.get("eval_dataset")
    _refuse_other_losses(trainer_name, args, arguments.get("compute_loss_func"))
    _check_settings(args)
    if not isinstance(model, str):
        require_causal_lm(model)
        peft_config = model.active_peft_config if is_peft_model(model) else peft_config
    _refuse_packed_prompt_learning(trainer_name, args, peft_config)
    for name, dataset in named_sets(eval_dataset).items():
        _require_dataset(f"eval_dataset[{name!r}]" if isinstance(eval_dataset, dict) else "eval_dataset", dataset)
    if isinstance(train_dataset, Dataset | IterableDataset):  # TRL refuses anything else
        _check_train_dataset(trainer_name, train_dataset)


def _refuse_other_losses(trainer_name: str, args: SFTConfig, compute_loss_func: Callable | None) -> None:
    if args.loss_type not in ("nll", "chunked_nll"):  # a deprecated alias
        raise InputError(
            f"`loss_type={args.loss_type!r}` is not supported: {trainer_name} has its own loss. Leave `loss_type` at "
            "'nll', or use `SFTTrainer`."
        )
    if args.label_smoothing_factor > 0:
        raise InputError(
            f"`label_smoothing_factor={args.label_smoothing_factor}` is not supported: {trainer_name} has its own "
            "loss. Set it to 0, or use `SFTTrainer`."
        )
    if compute_loss_func is not None:
        raise InputError(
            f"`compute_loss_func` is not supported: {trainer_name} has its own loss. Override "
            "`compute_annotated_loss` in a subclass instead."
        )


def _check_settings(args: SFTConfig) -> None:
    for name in ("max_length", "pad_to_multiple_of", "per_device_train_batch_size", "gradient_accumulation_steps"):
        value = getattr(args, name)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise InputError(f"`{name}` must be an integer of 1 or more, got {value!r}.")
    if (args.packing or args.eval_packing) and args.max_length is None:
        raise InputError(
            "When packing is enabled, `max_length` can't be `None`: set it to the length of a packed row."
        )
    if args.eval_packing and not (args.packing or args.padding_free) and args.packing_strategy != "wrapped":
        raise InputError(
            "`eval_packing=True` without `packing=True` is not supported: SFTTrainer keeps the documents of a packed "
            "row apart only where training is packed or padding-free. Leave `eval_packing` unset, or set "
            "`padding_free=True`."
        )
    metric = args.metric_for_best_model or ""
    if metric.endswith("nll") and args.greater_is_better:  # transformers' default of names that don't end in "loss"
        logger.warning(
            f"`metric_for_best_model={metric!r}` with `greater_is_better=True` calls the model with the highest loss "
            "the best. Set `greater_is_better=False`."
        )


def require_causal_lm(model: PreTrainedModel) -> None:
    """Refuse anything but a causal language model of `transformers` or `peft`."""
    is_adapted = isinstance(model, Module) and is_peft_model(model)
    base_model = model.get_base_model() if is_adapted else model
    if not isinstance(base_model, PreTrainedModel):
        raise InputError(
            f"`model` must be the id or folder of a model, a `PreTrainedModel` or a `PeftModel`, got "
            f"`{type(model).__name__}`."
        )
    if not base_model.can_generate() or base_model.config.is_encoder_decoder:
        raise InputError(
            f"`model` is a `{type(base_model).__name__}`, which is not a causal language model. Load one with "
            "`AutoModelForCausalLM`."
        )


def _require_dataset(name: str, dataset: Any) -> None:
    if not isinstance(dataset, Dataset | IterableDataset):
        raise InputError(f"`{name}` must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`.")


def _check_train_dataset(trainer_name: str, train_dataset: Dataset | IterableDataset) -> None:
    require_row("`train_dataset`", train_dataset)
    vision_columns = {"image", "images"} & set(get_dataset_column_names(train_dataset))
    if vision_columns:
        raise InputError(
            f"`train_dataset` has the column {min(vision_columns)!r}: vision data sets are not supported, because "
            f"their tokens are made batch by batch and {trainer_name} annotates them beforehand. Remove the column to "
            "train on the text alone."
        )


def refuse_what_was_loaded(trainer: SFTTrainer) -> None:
    """
    Refuse what is known only once the model is loaded and the data is prepared: context and sequence parallelism,
    models that are not causal language models, and token ids without an embedding.
    """
    refuse_sequence_sharding(type(trainer).__name__, trainer.accelerator)
    require_causal_lm(trainer.model)
    for name, dataset in (("train", trainer.train_dataset), *named_sets(trainer.eval_dataset).items()):
        require_embeddings(trainer.model, trainer._tokenizer, dataset, name)


def refuse_sequence_sharding(trainer_name: str, accelerator: Accelerator) -> None:
    """Refuse context and sequence parallelism, where a sample's tokens lie on several processes."""
    config = accelerator.parallelism_config
    for enabled, name in ((config.cp_enabled, "cp_size"), (config.sp_enabled, "sp_size")) if config else ():
        if enabled:
            raise InputError(
                f"{trainer_name} does not support `{name}={getattr(config, name)}`: the tokens of a sample would lie "
                f"on several processes, and its loss needs them together. Set `{name}=1`."
            )


def _refuse_packed_prompt_learning(trainer_name: str, args: SFTConfig, peft_config: PeftConfig | None) -> None:
    """
    Refuse several documents in a row with prompt learning: PEFT then drops `position_ids` (with a warning), and
    without them the documents would attend to each other.
    """
    is_padding_free = args.padding_free or (args.packing and args.packing_strategy != "wrapped")
    if is_padding_free and peft_config is not None and peft_config.is_prompt_learning:
        raise InputError(
            f"`{peft_config.peft_type.value}` does not keep the documents of a packed row apart, because "
            f"PEFT drops their positions, so {trainer_name} would train them as one. Set `packing=False` and "
            "`padding_free=False`, or train a LoRA adapter."
        )
