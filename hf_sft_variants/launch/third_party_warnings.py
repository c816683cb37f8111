"""Hides warnings of other libraries that a user of our commands can do nothing about; all others are shown."""

import logging
import warnings


# Category, regular expressions of the message's beginning and of the module
HIDDEN = [
    # TRL and PEFT call transformers by its old names, and so do recipes, for its older versions
    (FutureWarning, r"`(is_)?gradient_checkpointing(_\w+)?` is deprecated", r"transformers\."),
    # The quickstart's data: reasoning-gym imports cellpylib, which Python compiles the first time
    (SyntaxWarning, r'"is" with', r".*\bcellpylib\b"),
]


def hide_third_party_warnings() -> None:
    for category, message, module in HIDDEN:
        warnings.filterwarnings("ignore", message, category, module)
    logging.getLogger("DeepSpeed").addFilter(_is_worth_showing)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    """Not DeepSpeed's discovery, where it is installed, that this machine has no GPU."""
    return not record.getMessage().startswith("Setting accelerator to CPU")
