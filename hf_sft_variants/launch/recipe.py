"""`python -m hf_sft_variants.<method>`: the steps and keys of `trl sft` with the method's trainer."""

import importlib
import importlib.resources
import os
import sys
from argparse import ArgumentParser
from pickle import UnpicklingError
from typing import Any

from accelerate.logging import get_logger
from datasets import load_dataset
from safetensors import SafetensorError
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from ..errors import InputError, first_line
from .recipe_checks import check_flags, check_keys, check_module, read_mapping, typed_values


logger = get_logger(__name__)


def main(trainer_class: type, config_class: type, argv: list[str] | None = None) -> None:
    """
    Train `trainer_class` from a recipe, flags or both, with the steps and keys of `trl sft`.

    Started by `trl sft --config recipe.yaml` with `module: <the trainer's package>` in the recipe, by
    `python -m <the trainer's package>` or by `accelerate launch -m <the trainer's package>`. Input that can't be used
    ends the program with exit code 2 and a short message.

    Args:
        trainer_class (`type`):
            Subclass of [`~trl.SFTTrainer`] to train with.
        config_class (`type`):
            Its subclass of [`~trl.SFTConfig`], whose fields are keys of the recipe and flags of the command line.
        argv (`list[str]`, *optional*, defaults to `sys.argv[1:]`):
            `--config recipe.yaml`, and flags, which override the recipe.
    """
    parser = make_parser(trainer_class, config_class)
    try:
        train(trainer_class, *parse(parser, sys.argv[1:] if argv is None else argv))
    except InputError as error:
        parser.error(str(error))


def find_trainer_class(module: str) -> type[SFTTrainer]:
    """
    Find the one trainer in a package's namespace; of trainers that inherit from each other, the most derived.

    Raises:
        `InputError`: If the package can't be imported, or doesn't have exactly one trainer.
    """
    if os.getcwd() not in sys.path:  # `python -m` finds the modules of the current folder, a console script does not
        sys.path.append(os.getcwd())
    try:
        names = vars(importlib.import_module(module)).values()
    except ImportError as error:
        raise InputError(f"`module` is {module!r}, which can't be imported: {error}.") from error
    trainers = {name for name in names if isinstance(name, type) and issubclass(name, SFTTrainer)}
    parents = {parent for trainer in trainers for parent in trainer.__mro__[1:]}
    derived = sorted(trainers - parents, key=lambda trainer: trainer.__name__)
    if len(derived) != 1:
        found = ", ".join(trainer.__name__ for trainer in derived) or "none"
        raise InputError(f"`module` is {module!r}, which must have one subclass of SFTTrainer, but has {found}.")
    return derived[0]


def trainer_and_parser(module: str | None) -> tuple[type[SFTTrainer], TrlParser]:
    """Trainer of a recipe's `module`, or plain [`~trl.SFTTrainer`] without one, and the parser of its keys."""
    trainer_class = SFTTrainer if module is None else find_trainer_class(module)
    parser = make_parser(trainer_class, getattr(trainer_class, "config_class", SFTConfig))
    if module is not None:  # a user's own program may train another package's trainer
        parser.prog = f"python -m {module}"
    return trainer_class, parser


def make_parser(trainer_class: type, config_class: type) -> TrlParser:
    """Parser of `trl sft` with the fields of `config_class`. Abbreviated flags are off: they hide misspellings."""
    command = f"python -m {trainer_class.__module__.rpartition('.')[0]}"
    return TrlParser(
        (ScriptArguments, config_class, ModelConfig, DatasetMixtureConfig),
        prog=command,
        usage=f"{command} [--config recipe.yaml] [--key value ...]",
        description="Every key can be set in the recipe (`key: value`) or on the command line (`--key value`).",
        allow_abbrev=False,
    )


def parse(parser: TrlParser, argv: list[str]) -> tuple:
    """
    Parse a recipe and a command line into instances of the parser's dataclasses. Unknown keys and flags are errors.

    Args:
        parser ([`~trl.TrlParser`]):
            Parser from [`make_parser`], whose defaults become the recipe's values.
        argv (`list[str]`):
            Arguments as in [`main`].

    Raises:
        `InputError`: If a key, flag or value is unknown, missing or wrong.
    """
    before_script, flags = split_at_trl_script(list(argv))
    config_parser = ArgumentParser(prog=parser.prog, usage=parser.usage, add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    options, flags = config_parser.parse_known_args(flags)
    if options.config is None:
        flags = before_script + flags
    else:
        recipe = read_mapping(options.config)
        flags = without_repeated_keys(before_script, recipe) + flags
        apply_recipe(parser, recipe, options.config)
    return parse_flags(parser, flags)


def parse_flags(parser: TrlParser, flags: list[str]) -> tuple:
    """Parse flags alone, after [`apply_recipe`] or without a recipe."""
    check_flags(parser, flags)
    parsed = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    check_model_and_data(*parsed)
    return parsed


def split_at_trl_script(argv: list[str]) -> tuple[list[str], list[str]]:
    """`trl sft` puts the path of its own script between the flags it doesn't know and those it does."""
    script = str(importlib.resources.files("trl").joinpath("scripts", "sft.py"))
    if script not in argv:
        return [], argv
    position = argv.index(script)
    return argv[:position], argv[position + 1 :]


def without_repeated_keys(flags: list[str], recipe: dict) -> list[str]:
    """`trl sft` repeats keys below `module` that it doesn't know as strings before the flags; drop them."""
    keys = list(recipe)
    for key in keys[keys.index("module") + 1 :] if "module" in keys else []:
        if flags[:2] == [f"--{key}", str(recipe[key])]:
            flags = flags[2:]
    return flags


def apply_recipe(parser: TrlParser, recipe: dict, path: str) -> None:
    """Check a recipe, then set the parser's defaults from it and the environment from its `env`, as `trl sft` does."""
    environment = recipe.pop("env", {})
    try:
        check_keys(parser, recipe)
        check_module(recipe, parser.prog.removeprefix("python -m "))
        if not isinstance(environment, dict):
            raise InputError(f"`env` must be a mapping of variables to values, got {environment!r}.")
        defaults = typed_values(parser, recipe)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    os.environ.update({name: str(value) for name, value in environment.items()})
    parser.set_defaults_with_config(**defaults)


def check_model_and_data(script_args, training_args, model_args, dataset_args) -> None:
    if not model_args.model_name_or_path:
        raise InputError("`model_name_or_path` is missing: give an id on the Hub or a folder.")
    if not script_args.dataset_name and not dataset_args.datasets:
        raise InputError("`dataset_name` is missing: give an id on the Hub or a folder, or `datasets`.")


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
    if hasattr(trainer, "end"):  # transformers 5.18 and later: finishes the trackers and the process group
        trainer.end()


def model_options(model_args: ModelConfig, trust_remote_code: bool = False) -> dict[str, Any]:
    """
    Keyword arguments of `from_pretrained` from a recipe's keys; `model_init_kwargs` takes precedence over them.

    Raises:
        `InputError`: If `dtype` can't be used to compute with 4-bit weights, or the quantization keys are wrong.
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
    Build the trainer from parsed arguments; this loads its model and prepares its data.

    Raises:
        `InputError`: If the model or the data can't be loaded, or the trainer refuses them.
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

    Raises:
        `InputError`: If the data set can't be loaded, or has no such split.
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
            raise InputError(f"`dataset_name` is {name!r}, which can't be loaded: {error}") from error
    for key in ["dataset_train_split", "dataset_test_split"][: 2 if evaluates else 1]:
        split = getattr(script_args, key)
        if split not in dataset:
            raise InputError(f"`{key}` is {split!r}, but the data set has {', '.join(dataset)}: name one of these.")
    train_dataset = dataset[script_args.dataset_train_split]
    return train_dataset, dataset[script_args.dataset_test_split] if evaluates else None
