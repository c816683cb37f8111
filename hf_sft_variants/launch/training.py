"""`python -m hf_sft_variants.<method>`: the steps of `trl sft` with the method's trainer."""

import logging
import sys
from pickle import UnpicklingError
from typing import Any

from accelerate.logging import get_logger
from datasets import load_dataset
from safetensors import SafetensorError
from trl import ModelConfig, get_dataset, get_peft_config, get_quantization_config

from ..errors import InputError, first_line
from .loading import DATA_TO_PASS
from .parsing import make_parser, parse
from .third_party_warnings import hide_third_party_warnings


logger = get_logger(__name__)


def main(trainer_class: type, config_class: type, argv: list[str] | None = None) -> None:
    """
    Train from a recipe, flags or both, with the steps of `trl sft` and its keys, plus the fields that `config_class`
    adds. `argv` defaults to `sys.argv[1:]`. Invalid input ends the program with exit code 2 and a short message.
    """
    hide_third_party_warnings()
    # Python shows warnings only, but users want to know, for example, which stage begins
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_sft_variants").setLevel(logging.INFO)
    parser = make_parser(trainer_class, config_class)
    try:
        train(trainer_class, *parse(parser, sys.argv[1:] if argv is None else argv))
    except InputError as error:
        parser.error(str(error))


def train(trainer_class, script_args, training_args, model_args, dataset_args) -> None:
    """Load, train and save, step by step as `trl sft` does."""
    trainer = build_trainer(trainer_class, script_args, training_args, model_args, dataset_args)
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=str(resume).lower() == "true" or resume)  # flags are strings
    trainer.accelerator.print("✅ Training completed.")
    save(trainer, script_args)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")
    trainer.accelerator.end_training()  # finishes the trackers and the process group


def model_options(model_args: ModelConfig, trust_remote_code: bool = False) -> dict[str, Any]:
    """
    Keyword arguments of `from_pretrained` from a recipe's keys. Raises an `InputError` if `dtype` can't be used to
    compute with 4-bit weights, or the quantization keys are wrong.
    """
    if model_args.load_in_4bit and model_args.dtype == "auto":
        raise InputError("`dtype` must be float32, bfloat16 or float16 with `load_in_4bit`, got 'auto'.")
    try:
        quantization_config = get_quantization_config(model_args)
    except ValueError as error:
        raise InputError(f"The quantization keys can't be used: {first_line(error)}") from error
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": quantization_config,
    }


def build_trainer(trainer_class, script_args, training_args, model_args, dataset_args):
    """
    Build the trainer from parsed arguments; this loads its model and prepares its data. The keys that load the model
    are added to `training_args.model_init_kwargs`, whose own values take precedence.
    """
    options = model_options(model_args, training_args.trust_remote_code)
    quantization_config = options.pop("quantization_config")
    training_args.model_init_kwargs = {**options, **(training_args.model_init_kwargs or {})}
    train_dataset, eval_dataset = load_data(script_args, dataset_args, evaluates=training_args.eval_strategy != "no")
    model = model_args.model_name_or_path
    try:
        return trainer_class(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=quantization_config,
            peft_config=get_peft_config(model_args),
        )
    except (OSError, SafetensorError, UnpicklingError) as error:
        raise InputError(f"`model_name_or_path` is {model!r}, which can't be loaded: {error}") from error


def save(trainer, script_args) -> None:
    """Save the trained model, its tokenizer and its model card."""
    trainer.create_model_card(dataset_name=script_args.dataset_name)  # `trl sft` writes one with checkpoints only
    trainer.save_model(trainer.args.output_dir)
    trainer.accelerator.print(f"💾 Model saved to {trainer.args.output_dir}.")


def load_data(script_args, dataset_args, evaluates: bool = False) -> tuple:
    """
    Load the training split of a recipe's data set, and the evaluation split if there are evaluations, else `None`.
    """
    name = script_args.dataset_name
    if dataset_args.datasets:
        if name:
            logger.warning("Both `datasets` and `dataset_name` are given: `dataset_name` is ignored.")
        dataset = get_dataset(dataset_args)
    else:
        try:
            dataset = load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
        except (OSError, ValueError) as error:
            raise InputError(f"`dataset_name` is {name!r}, which can't be loaded: {error}. {DATA_TO_PASS}") from error
    for key in ["dataset_train_split", "dataset_test_split"][: 2 if evaluates else 1]:
        split = getattr(script_args, key)
        if split not in dataset:
            raise InputError(f"`{key}` is {split!r}, but the data set has {', '.join(dataset)}: name one of these.")
    train_dataset = dataset[script_args.dataset_train_split]
    return train_dataset, dataset[script_args.dataset_test_split] if evaluates else None
