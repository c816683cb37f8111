"""Extracts the final answer from a chain of thought: a number after `####`, as in GSM8K, or `\\boxed{}`."""

import re

from ..errors import InputError


ANSWER_MARK = "####"
# Sign and dollar in either order; thousands in groups of three, or two as in 1,00,000; or no digit before the point
NUMBER = re.compile(r"\$?([-+−]?)\$?(?:(\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.(\d*))?|(?<![\w.])\.(\d+))")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def normalize_number(text: str) -> str:
    """
    Convert a number such as `" -$1,036.0"` to its shortest form (`"-1036"`), so that equal numbers are equal strings.
    Raises an `InputError` if `text` is not a number.
    """
    match = NUMBER.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{text!r} is not a number: use digits, optionally with a sign, `$`, separators or decimals.")
    return _shortest(match)


def extract_answer(text: str) -> str | None:
    """
    Extract the first number after the last `####`, on the same line, normalized with [`normalize_number`]. The last
    mark is used because a model may write several before it settles on an answer.
    """
    _, mark, tail = text.rpartition(ANSWER_MARK)
    match = NUMBER.search(tail.split("\n", 1)[0]) if mark else None
    return _shortest(match) if match else None


def extract_last_number(text: str) -> str | None:
    """Extract the last number of a text, for models that never learned to mark their answer."""
    matches = list(NUMBER.finditer(text))
    return _shortest(matches[-1]) if matches else None


def extract_boxed(text: str) -> str | None:
    """Extract the content of the last non-empty `\\boxed{}`, matching braces. An unclosed box ends with its line."""
    for match in reversed(list(BOX.finditer(text))):
        content = _braced(text, match.end()).strip()
        if content:
            return content
    return None


def _braced(text: str, start: int) -> str:
    depth = 1
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start:end]
    return text[start:].split("\n", 1)[0]


def _shortest(match: re.Match) -> str:
    # Kept as text: a generated number may be longer than what Python can convert, and must not be rounded
    sign, integer, fraction, bare_fraction = match.groups(default="")
    integer = integer.replace(",", "").lstrip("0") or "0"
    fraction = (fraction or bare_fraction).rstrip("0")
    number = f"{integer}.{fraction}" if fraction else integer
    return f"-{number}" if sign in ("-", "−") and number != "0" else number
