"""Strict reading of a recipe: every key is known, in a place where it has an effect, and has a value of its type."""

import difflib
import sys
from argparse import Action, ArgumentTypeError
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from inspect import formatannotation
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

import yaml
from accelerate.commands.launch import launch_command_parser
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from trl import TrlParser

from ..errors import InputError


def read_mapping(path: str | Path) -> dict:
    """Read a YAML file of `key: value` lines."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold lines of `key: value` (a YAML mapping), got {content!r}.")
    return content


@contextmanager
def error_in(where: str) -> Iterator[None]:
    """Prefix an `InputError` with where the input is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def check_keys(parser: TrlParser, recipe: dict) -> None:
    """
    Refuse unknown keys, and options of `accelerate launch` below `module`, where `trl sft` does not pass them on.
    """
    known, options = key_types(parser), launch_options()
    below_module = False
    for key in recipe:
        if key not in known and f"--{key}" not in options:
            everything = [*known, *(option.removeprefix("--") for option in options)]
            raise InputError(f"unknown key `{key}`" + nearest(key, everything))
        if below_module and key not in known and key != "accelerate_config":
            raise InputError(f"`{key}` is an option of `accelerate launch`: move it above `module`.")
        below_module = below_module or key == "module"


def check_module(recipe: dict, package: str) -> None:
    """`module` must be the trainer's package, or the program that was started, which may train that trainer too."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    started = {package, spec.name.removesuffix(".__main__") if spec else package}
    if recipe.get("module", package) not in started:
        raise InputError(f"`module` is {recipe['module']}, but {package} was started: start {recipe['module']}.")


def check_flags(parser: TrlParser, flags: list[str]) -> None:
    _, unknown = parser.parse_known_args(flags)
    names = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    if names and names[0] in launch_options():
        raise InputError(
            f"command line: `{names[0]}` is an option of `accelerate launch`. Give it before `-m`, or in the recipe "
            "above `module`."
        )
    if names:
        raise InputError(f"command line: unknown flag `{names[0]}`" + nearest(names[0], parser._option_string_actions))
    if unknown:
        raise InputError(f"command line: `{unknown[0]}` does not belong to a flag; pass a recipe as `--config FILE`.")


def launch_options() -> set[str]:
    # `accelerate_config` is TRL's: it becomes accelerate's `--config_file`.
    return {"--accelerate_config", *launch_command_parser()._option_string_actions}


def nearest(name: str, known: Iterable[str], otherwise: str = "`--help` lists the known ones") -> str:
    matches = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean `{matches[0]}`?" if matches else f"; {otherwise}."


def key_types(parser: TrlParser) -> dict[str, Any]:
    types = {}
    for dataclass_type in parser.dataclass_types:
        hints = get_type_hints(dataclass_type)
        types |= {field.name: hints[field.name] for field in fields(dataclass_type) if field.init}
    return types


def typed_values(parser: TrlParser, recipe: dict) -> dict:
    """The recipe's values as the command line would give them: `1e-3`, a string in YAML, becomes a number."""
    types = key_types(parser)
    return {
        key: typed_value(key, value, types[key], parser._option_string_actions[f"--{key}"])
        for key, value in recipe.items()
        if key in types
    }


def typed_value(key: str, value: Any, wanted: Any, flag: Action) -> Any:
    choices, typed = list(flag.choices or []), value
    with suppress(ValueError, ArgumentTypeError):
        typed = converted(value, flag)
    if is_dataclass(flag.type):
        check_entries(key, typed, flag.type)
    elif choices and typed not in choices and typed is not None:
        hint = ' (YAML reads an unquoted no as false: write "no")' if value is False and "no" in choices else ""
        raise InputError(f"`{key}` must be one of {', '.join(map(str, choices))}, got {value!r}{hint}.")
    # `trl sft` takes `resume_from_checkpoint: true` and `dataset_config: 2024`
    elif flag.type is not str or not isinstance(typed, bool | int | float):
        check_type(f"`{key}`", typed, wanted)
    return typed


def converted(value: Any, flag: Action) -> Any:
    if flag.nargs == "+" and value is not None:  # a list; a single value is a list of one, as on the command line
        return [_converted(item, flag.type) for item in (value if isinstance(value, list) else [value])]
    return _converted(value, flag.type)


def _converted(value: Any, flag_type: Any) -> Any:
    is_whole_number = flag_type is float and type(value) is int
    return flag_type(value) if isinstance(value, str) or is_whole_number else value


def check_type(name: str, value: Any, wanted: Any) -> None:
    """Check a value against an annotation."""
    try:
        validate_typed_dict(TypedDict("Value", {"value": wanted}), {"value": value})
    except StrictDataclassFieldValidationError as error:
        raise InputError(f"{name} must be {formatannotation(wanted)}, got {value!r}.") from error


def check_entries(key: str, entries: list, entry_type: type) -> None:
    """Check the keys of the entries of `datasets`, which are mappings."""
    names = [field.name for field in fields(entry_type)]
    required = [field.name for field in fields(entry_type) if field.default is MISSING]
    for entry in [entry for entry in entries if isinstance(entry, dict)]:
        for name in entry:
            if name not in names:
                raise InputError(f"unknown key `{name}` in `{key}`" + nearest(name, names))
        for name in required:
            if name not in entry:
                raise InputError(f"`{name}` is missing in an entry of `{key}`: {entry}.")
