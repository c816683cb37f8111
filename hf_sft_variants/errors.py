"""Errors in what the user gave. The command line shows them without a traceback."""


class InputError(ValueError):
    """An argument, a file or a row can't be used. The message names it, its value and the fix."""


def first_line(error: Exception) -> str:
    """First line of an error's message, with the next where it ends with a colon; its class where it has none."""
    first, _, rest = str(error).strip().partition("\n")
    if first.endswith(":"):
        first = f"{first} {rest.strip().partition(chr(10))[0]}"
    return first.strip() or type(error).__name__
