"""Checks the types and choices of a configuration's fields, and converts their values to JSON."""

import inspect
import json
import os
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trl import SFTConfig

from ..errors import InputError


def require_valid_fields(config: SFTConfig) -> None:
    """
    Check the types and choices of the fields that a subclass of [`~trl.SFTConfig`] adds. Paths become strings, in
    place.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        name = field.name
        if name in SFTConfig.__dataclass_fields__:
            continue
        if isinstance(getattr(config, name), os.PathLike):
            setattr(config, name, os.fspath(getattr(config, name)))
        # A dictionary may be given as JSON, which is read by now
        wanted = dict | None if name in config._VALID_DICT_FIELDS else hints[name]
        value, choices = getattr(config, name), field.metadata.get("choices")
        if not has_type(value, wanted):
            raise InputError(f"`{name}` must be {inspect.formatannotation(wanted)}, got {value!r}.")
        if choices is not None and value not in choices:
            raise InputError(f"`{name}={value!r}` is unknown; choose one of {choices}.")


def has_type(value: Any, wanted: Any) -> bool:
    """Whether a value has the type that a field's annotation asks for."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(has_type(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list | tuple) and all(has_type(item, arguments[0]) for item in value)
    if is_dataclass(wanted):
        return isinstance(value, (wanted, dict))
    if wanted in (int, float):  # Python counts booleans among the integers
        return isinstance(value, Integral if wanted is int else Real) and not isinstance(value, bool)
    return isinstance(value, origin or wanted)


def as_json_values(value: Any) -> Any:
    """Convert to JSON values; what JSON can't hold, such as a `dtype` or a quantization, becomes a string."""
    return json.loads(json.dumps(value, default=str))
