"""What is settled around `SFTTrainer.__init__`: the configuration's class, and what can't be right, in words."""

from dataclasses import fields

from accelerate import Accelerator
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTConfig

from .trl_internals import get_config_model_id, get_dataset_column_names


def resolve_args(
    args: TrainingArguments | None, config_class: type[SFTConfig], model: str | PreTrainedModel, method_name: str
) -> SFTConfig:
    """
    The trainer's arguments as its own configuration class: built by default, or from a plainer configuration.

    `SFTTrainer` would build an `SFTConfig`, which lacks the method's fields.

    Raises:
        `TypeError`: If `args` is another method's configuration.
    """
    if args is None:
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{model_id.split('/')[-1]}-{method_name}")
    if isinstance(args, config_class):
        return args
    if issubclass(config_class, type(args)):
        return config_class(**{field.name: getattr(args, field.name) for field in fields(args) if field.init})
    raise TypeError(
        f"`args` is a `{type(args).__name__}`, which is no `{config_class.__name__}`. Pass such a one, "
        "an `SFTConfig` (the method's fields then have their defaults), or nothing."
    )


def require_choices(config: SFTConfig) -> None:
    """
    Check the fields with choices that a subclass of [`~trl.SFTConfig`] has added.

    Raises:
        `ValueError`: If a value is none of them.
    """
    for field in fields(config):
        name, choices = field.name, field.metadata.get("choices")
        if choices is not None and name not in SFTConfig.__dataclass_fields__ and getattr(config, name) not in choices:
            raise ValueError(f"`{name}={getattr(config, name)!r}` is unknown; choose one of {choices}.")


def keep_streams_whole(args: SFTConfig) -> None:
    """
    For streams accelerate would cut every tensor to the number of rows, those of padding-free batches too. SFTTrainer
    sets this for a streaming training set only, not for a streaming evaluation set.
    """
    if args.accelerator_config.dispatch_batches is None:
        args.accelerator_config.dispatch_batches = False


def refuse_unsupported(
    trainer_name: str,
    args: SFTConfig,
    train_dataset: Dataset | IterableDataset | None,
    compute_loss_func,
) -> None:
    """
    Refuse what another loss than `SFTTrainer`'s own would have to come from, and data it can't annotate.

    Raises:
        `ValueError`: For `loss_type` other than `"nll"`, label smoothing, `compute_loss_func`, `eval_packing` alone,
            an empty data set and vision data sets.
    """
    if args.loss_type != "nll":
        raise ValueError(
            f"`loss_type={args.loss_type!r}` is not supported: {trainer_name} has its own loss. Leave `loss_type` at "
            "'nll', or use `SFTTrainer`."
        )
    if args.label_smoothing_factor > 0:
        raise ValueError(
            f"`label_smoothing_factor={args.label_smoothing_factor}` is not supported: {trainer_name} has its own "
            "loss. Set it to 0, or use `SFTTrainer`."
        )
    if compute_loss_func is not None:
        raise ValueError(
            f"`compute_loss_func` is not supported: {trainer_name} has its own loss. Override "
            "`compute_annotated_loss` in a subclass instead."
        )
    if args.eval_packing and not (args.packing or args.padding_free) and args.packing_strategy != "wrapped":
        raise ValueError(
            "`eval_packing=True` without `packing=True` is not supported: SFTTrainer keeps the documents of a packed "
            "row apart only where training is packed or padding-free. Leave `eval_packing` unset, or set "
            "`padding_free=True`."
        )
    if isinstance(train_dataset, Dataset) and len(train_dataset) == 0:
        raise ValueError("`train_dataset` is empty. Check the split and the filters that made it.")
    if isinstance(train_dataset, Dataset | IterableDataset):
        vision_columns = {"image", "images"} & set(get_dataset_column_names(train_dataset))
        if vision_columns:
            raise ValueError(
                f"`train_dataset` has the column {min(vision_columns)!r}: vision data sets are not supported, "
                f"because their tokens are made batch by batch and {trainer_name} annotates them beforehand. Remove "
                "the column to train on the text alone."
            )


def refuse_sequence_sharding(trainer_name: str, accelerator: Accelerator) -> None:
    """
    Refuse context and sequence parallelism, where a sample's tokens lie on several processes.

    Raises:
        `ValueError`: If either is configured.
    """
    config = accelerator.parallelism_config
    for enabled, name in ((config.cp_enabled, "cp_size"), (config.sp_enabled, "sp_size")) if config else ():
        if enabled:
            raise ValueError(
                f"{trainer_name} does not support `{name}={getattr(config, name)}`: the tokens of a sample would lie "
                f"on several processes, and its loss needs them together. Set `{name}=1`."
            )


def refuse_packed_prompt_learning(trainer_name: str, model: PreTrainedModel, padding_free: bool) -> None:
    """
    Refuse several documents in a row where PEFT puts virtual tokens in front of the row: it drops `position_ids` (and
    warns of that), without which the documents would attend to each other.

    Raises:
        `ValueError`: For prompt learning with `packing` or `padding_free`.
    """
    if padding_free and is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"`{model.active_peft_config.peft_type.value}` does not keep the documents of a packed row apart, because "
            f"PEFT drops their positions, so {trainer_name} would train them as one. Set `packing=False` and "
            "`padding_free=False`, or train a LoRA adapter."
        )
