"""What `python -m hf_sft_variants.<method>` runs: the steps and the keys of `trl sft`, with the method's trainer."""

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
    Train `trainer_class` from a recipe, from flags, or both, with the steps and the keys of `trl sft`.

    It may be started by `trl sft --config recipe.yaml` (the recipe says `module: <the trainer's package>`), by
    `python -m <the trainer's package>` or by `accelerate launch -m <the trainer's package>`. An input that can't be
    used ends the program with code 2 and a short message.

    Args:
        trainer_class (`type`):
            Subclass of [`~trl.SFTTrainer`] to train with.
        config_class (`type`):
            Its subclass of [`~trl.SFTConfig`]: its fields are keys of the recipe and flags of the command line.
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
    The one trainer that a package names: of those that inherit from each other, the most special one.

    Raises:
        `InputError`: If the package can't be imported, or has no trainer or several.
    """
    if os.getcwd() not in sys.path:  # `python -m` finds the modules of the current folder, a console script does not
        sys.path.append(os.getcwd())
    try:
        names = vars(importlib.import_module(module)).values()
    except ImportError as error:
        raise InputError(f"`module` is {module!r}, which can't be imported: {error}.") from error
    trainers = {name for name in names if isinstance(name, type) and issubclass(name, SFTTrainer)}
    parents = {parent for trainer in trainers for parent in trainer.__mro__[1:]}
    special = sorted(trainers - parents, key=lambda trainer: trainer.__name__)
    if len(special) != 1:
        found = ", ".join(trainer.__name__ for trainer in special) or "none"
        raise InputError(f"`module` is {module!r}, which must have one subclass of SFTTrainer, but has {found}.")
    return special[0]


def trainer_and_parser(module: str | None) -> tuple[type[SFTTrainer], TrlParser]:
    """What a recipe's `module` trains with, plain [`~trl.SFTTrainer`] without one, and the parser of its keys."""
    trainer_class = SFTTrainer if module is None else find_trainer_class(module)
    parser = make_parser(trainer_class, getattr(trainer_class, "config_class", SFTConfig))
    if module is not None:  # a program of one's own may train a trainer of another package
        parser.prog = f"python -m {module}"
    return trainer_class, parser


def make_parser(trainer_class: type, config_class: type) -> TrlParser:
    """The parser of `trl sft` with the keys of `config_class`, without abbreviated flags: they hide misspellings."""
    command = f"python -m {trainer_class.__module__.rpartition('.')[0]}"
    return TrlParser(
        (ScriptArguments, config_class, ModelConfig, DatasetMixtureConfig),
        prog=command,
        usage=f"{command} [--config recipe.yaml] [--key value ...]",
        description="Every key can stand in the recipe (`key: value`) or on the command line (`--key value`).",
        allow_abbrev=False,
    )


def parse(parser: TrlParser, argv: list[str]) -> tuple:
    """
    Read a recipe and a command line strictly: nothing unknown is passed over.

    Args:
        parser ([`~trl.TrlParser`]):
            What [`make_parser`] returns. Its defaults become the recipe's values.
        argv (`list[str]`):
            As in [`main`].

    Returns:
        `tuple`: Instances of the parser's dataclasses.

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
    """What [`parse`] returns, of a command line without a recipe, or behind [`apply_recipe`]."""
    check_flags(parser, flags)
    parsed = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    check_model_and_data(*parsed)
    return parsed


def split_at_trl_script(argv: list[str]) -> tuple[list[str], list[str]]:
    """`trl sft` puts the path of its own script between what it does not know and the flags it knows."""
    script = str(importlib.resources.files("trl").joinpath("scripts", "sft.py"))
    if script not in argv:
        return [], argv
    position = argv.index(script)
    return argv[:position], argv[position + 1 :]


def without_repeated_keys(flags: list[str], recipe: dict) -> list[str]:
    """`trl sft` repeats the recipe's keys below `module` that it does not know, as text, in front of the flags."""
    keys = list(recipe)
    for key in keys[keys.index("module") + 1 :] if "module" in keys else []:
        if flags[:2] == [f"--{key}", str(recipe[key])]:
            flags = flags[2:]
    return flags


def apply_recipe(parser: TrlParser, recipe: dict, path: str) -> None:
    """Check the recipe, and make its values the parser's defaults and its `env` the environment, as `trl sft` does."""
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
    where = "in the recipe or on the command line"
    if not model_args.model_name_or_path:
        raise InputError(f"`model_name_or_path` is missing: give a model of the Hub or a folder, {where}.")
    if not script_args.dataset_name and not dataset_args.datasets:
        raise InputError(f"`dataset_name` is missing: give a data set of the Hub or a folder, {where}, or `datasets`.")


def train(trainer_class, script_args, training_args, model_args, dataset_args) -> None:
    """Load, train and save what [`parse`] returned, step by step as `trl sft` does."""
    trainer = build_trainer(trainer_class, script_args, training_args, model_args, dataset_args)
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=str(resume).lower() == "true" or resume)  # a flag is text
    trainer.accelerator.print("✅ Training completed.")
    save(trainer, script_args)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")
    if hasattr(trainer, "end"):  # transformers 5.18 and later: finishes the trackers and the process group
        trainer.end()


def model_options(model_args: ModelConfig, trust_remote_code: bool = False) -> dict[str, Any]:
    """
    Keyword arguments of `from_pretrained` that a recipe's keys stand for; `model_init_kwargs` goes before them.

    Raises:
        `InputError`: If `dtype` can't be that of the computations with 4-bit weights, or a key of the quantization has
            a value that it can't have.
    """
    if model_args.load_in_4bit and model_args.dtype == "auto":
        raise InputError("`dtype` must be float32, bfloat16 or float16 with `load_in_4bit`, got 'auto'.")
    try:
        quantization_config = get_quantization_config(model_args)
    except ValueError as error:
        raise InputError(f"The model can't be quantized as the keys say: {first_line(error)}") from error
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": quantization_config,
    }


def build_trainer(trainer_class, script_args, training_args, model_args, dataset_args):
    """
    The trainer of what [`parse`] returned, its model and its data loaded and prepared.

    Raises:
        `InputError`: If the model or the data can't be loaded, or the trainer refuses them.
    """
    options = model_options(model_args, training_args.trust_remote_code)
    quantization_config = options.pop("quantization_config")
    training_args.model_init_kwargs = {**options, **(training_args.model_init_kwargs or {})}
    dataset = load_splits(script_args, dataset_args)
    evaluates = training_args.eval_strategy != "no"
    train_dataset = pick_split(dataset, "dataset_train_split", script_args)
    eval_dataset = pick_split(dataset, "dataset_test_split", script_args) if evaluates else None
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
    """The trained model, its tokenizer and its model card."""
    trainer.create_model_card(dataset_name=script_args.dataset_name)  # `trl sft` writes one with checkpoints only
    trainer.save_model(trainer.args.output_dir)
    trainer.accelerator.print(f"💾 Model saved to {trainer.args.output_dir}.")


def load_splits(script_args, dataset_args):
    name = script_args.dataset_name
    if dataset_args.datasets:
        if name:
            logger.warning("Both `datasets` and `dataset_name` are given: `dataset_name` is ignored.")
        return get_dataset(dataset_args)
    try:
        return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    except (OSError, ValueError) as error:
        raise InputError(f"`dataset_name` is {name!r}, which can't be loaded: {error}") from error


def pick_split(dataset, key: str, script_args):
    name = getattr(script_args, key)
    if name not in dataset:
        raise InputError(f"`{key}` is {name!r}, but the data set has {', '.join(dataset)}: name one of these.")
    return dataset[name]
