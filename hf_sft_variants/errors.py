"""The one exception that the command line shows without a traceback."""


class InputError(ValueError):
    """Something the caller passed cannot be used. The message names the argument, its value and the fix."""
