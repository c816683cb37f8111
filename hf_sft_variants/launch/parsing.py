"""Reads recipes and command lines as `trl sft` does, but strictly, and finds the trainer of a recipe's `module`."""

import copy
import importlib
import os
import sys
from argparse import ArgumentParser
from importlib.resources import files

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

from ..errors import InputError
from .recipe_checks import check_flags, check_keys, check_module, error_in, read_mapping, typed_values


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
    Parse a command line into instances of the parser's dataclasses: `--config recipe.yaml`, which [`apply_recipe`]
    applies, and flags, which override the recipe.
    """
    before_script, flags = split_at_trl_script(list(argv))
    config_parser = ArgumentParser(prog=parser.prog, usage=parser.usage, add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    options, flags = config_parser.parse_known_args(flags)
    if options.config is not None:
        recipe = read_mapping(options.config)
        before_script = without_repeated_keys(before_script, recipe)
        with error_in(options.config):
            apply_recipe(parser, recipe)
    return parse_flags(parser, before_script + flags)


def parse_recipe(recipe: dict) -> tuple[type[SFTTrainer], tuple]:
    """Parse a recipe without a command line; returns the trainer class that it names, and the dataclass instances."""
    trainer_class, parser = trainer_and_parser(recipe.get("module"))
    apply_recipe(parser, recipe)
    return trainer_class, parse_flags(parser, [])


def split_at_trl_script(argv: list[str]) -> tuple[list[str], list[str]]:
    """
    Split the arguments at the path of TRL's script, which `trl sft` puts between the flags it doesn't know and those
    it does.
    """
    script = str(files("trl").joinpath("scripts", "sft.py"))
    if script not in argv:
        return [], argv
    position = argv.index(script)
    return argv[:position], argv[position + 1 :]


def without_repeated_keys(flags: list[str], recipe: dict) -> list[str]:
    """Drop the keys below `module` that `trl sft` doesn't know and repeats as strings before the flags."""
    keys = list(recipe)
    for key in keys[keys.index("module") + 1 :] if "module" in keys else []:
        if flags[:2] == [f"--{key}", str(recipe[key])]:
            flags = flags[2:]
    return flags


def apply_recipe(parser: TrlParser, recipe: dict) -> None:
    """Check a recipe, then set the parser's defaults from it and the environment from its `env`, as `trl sft` does."""
    recipe = copy.deepcopy(recipe)  # TRL's dataclasses change values in place
    environment = recipe.pop("env", {})
    check_keys(parser, recipe)
    check_module(recipe, parser.prog.removeprefix("python -m "))
    if not isinstance(environment, dict):
        raise InputError(f"`env` must be a mapping of variables to values, got {environment!r}.")
    parser.set_defaults_with_config(**typed_values(parser, recipe))
    os.environ.update({name: str(value) for name, value in environment.items()})


def parse_flags(parser: TrlParser, flags: list[str]) -> tuple:
    """Parse flags, after [`apply_recipe`] if there is a recipe."""
    check_flags(parser, flags)
    parsed = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    script_args, _, model_args, dataset_args = parsed
    if not model_args.model_name_or_path:
        raise InputError("`model_name_or_path` is missing: give an id on the Hub or a folder.")
    if not script_args.dataset_name and not dataset_args.datasets:
        raise InputError("`dataset_name` is missing: give an id on the Hub or a folder, or `datasets`.")
    return parsed


def trainer_and_parser(module: str | None) -> tuple[type[SFTTrainer], TrlParser]:
    """Trainer of a recipe's `module`, or plain [`~trl.SFTTrainer`] without one, and the parser of its keys."""
    trainer_class = SFTTrainer if module is None else find_trainer_class(module)
    parser = make_parser(trainer_class, getattr(trainer_class, "config_class", SFTConfig))
    if module is not None:  # a user's own program may train another package's trainer
        parser.prog = f"python -m {module}"
    return trainer_class, parser


def find_trainer_class(module: str) -> type[SFTTrainer]:
    """
    Find the one trainer in a package's namespace; of trainers that inherit from each other, the most derived. Raises
    an `InputError` if the package can't be imported, or doesn't have exactly one trainer.
    """
    if os.getcwd() not in sys.path:  # `python -m` finds the modules of the current folder, a console script does not
        sys.path.append(os.getcwd())
    try:
        names = vars(importlib.import_module(module)).values()
    except ImportError as error:
        raise InputError(f"`module` is {module!r}, which can't be imported: {error}.") from error
    trainers = {name for name in names if isinstance(name, type) and issubclass(name, SFTTrainer)}
    parents = {parent for trainer in trainers for parent in trainer.__mro__[1:]}
    derived = sorted(trainer.__name__ for trainer in trainers - parents)
    if len(derived) != 1:
        found = ", ".join(derived) or "none"
        raise InputError(f"`module` is {module!r}, which must have one subclass of SFTTrainer, but has {found}.")
    return (trainers - parents).pop()
