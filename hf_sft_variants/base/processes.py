"""Decisions that all processes of a run have to share."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..errors import InputError


T = TypeVar("T")


def on_main_process(function: Callable[[], T]) -> T:
    """
    Call a function on the main process alone; every process gets its result, or raises its `InputError`. Must be
    called by all processes. The others wait in a collective, so the function has to be quick. Meant for what only the
    main process is sure to see, such as a file on its machine.
    """
    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except InputError as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result
