"""Errors in the user's input, which the command line shows without a traceback."""


class InputError(ValueError):
    """An argument, file or row can't be used. The message names it, its value and the fix."""


def first_line(error: Exception) -> str:
    """First line of an error's message, joined with the next if it ends with a colon; its class if it is empty."""
    first, _, rest = str(error).strip().partition("\n")
    if first.endswith(":"):
        first = f"{first} {rest.strip().partition(chr(10))[0]}"
    return first.strip() or type(error).__name__
