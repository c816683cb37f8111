"""Errors in what the user gave. The command line shows them without a traceback."""


class InputError(ValueError):
    """An argument, a file or a row can't be used. The message names it, its value and the fix."""


def first_line(error: Exception) -> str:
    """First line of an error's message; the name of its class where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
