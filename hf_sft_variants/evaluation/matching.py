"""Compares answers regardless of notation."""

import re
import threading
import warnings

from ..errors import InputError
from .answers import NUMBER, extract_boxed, normalize_number


QUOTES = (('"', '"'), ("'", "'"), ("`", "`"), ("“", "”"), ("‘", "’"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
# A number in "x2", "\sqrt{2}", "3 * x" or "x^2" is part of something else; in "42 apples" and "x = 42" it is not
PART_OF_FORMULA_BEFORE = re.compile(r"(?:\w|[\\^_{*+/√]\s*)\Z")
PART_OF_FORMULA_AFTER = re.compile(r"\w|\s*[\^_}*+×√π]|\s*\\(?![%$,]|text|mathrm|mbox)")
# sympy takes minutes for the output of a model that did not stop
MAX_FORMULA_LENGTH = 500


def same_answer(predicted: str | None, gold: str) -> bool:
    """
    Whether a predicted answer (`None` if there is none) is the expected one. The first rule that applies decides:

    * The texts are equal, ignoring white space, case, a final full stop, and any surrounding quotes, dollar signs or
      `\\boxed{}`.
    * `gold` is a number: `predicted` must contain that number and no other, as in "42 apples". Signs, thousands
      separators, decimals and dollar signs may be written in any way; percentages and units are not converted. A
      number that is part of a formula, as in `\\sqrt{2}`, does not count.
    * `gold` is a formula and the optional package math-verify is installed (`pip install 'hf_sft_variants[math]'`):
      `predicted` must be mathematically equal. This only works in the main thread, because math-verify's timeout does.
    """
    if predicted is None:
        return False
    predicted, gold = _bare(predicted), _bare(gold)
    if predicted.casefold() == gold.casefold():
        return gold != ""
    number = _number(gold)
    if number is not None:
        return _only_number(predicted) == number
    return _is_formula(gold) and _equal_formulas(gold, predicted)


def _bare(text: str) -> str:
    text = " ".join((extract_boxed(text) or text).split())
    while True:
        bare = text.rstrip(".").strip()
        for opening, closing in QUOTES:
            if len(bare) > len(opening + closing) and bare.startswith(opening) and bare.endswith(closing):
                bare = bare.removeprefix(opening).removesuffix(closing).strip()
        if bare == text:
            return text
        text = bare


def _number(text: str) -> str | None:
    try:
        return normalize_number(text.strip("$ "))
    except InputError:
        return None


def _only_number(text: str) -> str | None:
    """Return the number in a text that has exactly one, unless it is part of a formula."""
    text = text.replace("**", "")  # Markdown's bold
    matches = list(NUMBER.finditer(text))
    if len(matches) != 1:
        return None
    start, end = matches[0].span()
    if PART_OF_FORMULA_BEFORE.search(text[:start]) or PART_OF_FORMULA_AFTER.match(text, end):
        return None
    return _number(matches[0].group())


def _is_formula(text: str) -> bool:
    """Whether a text is a formula, without words: sympy reads a word as a product, so "Pairs" would equal "Paris"."""
    rest = re.sub(r"\\(?!text|mathrm|mbox)[A-Za-z]+", r"\\", text)
    return re.search(r"[\d\\+\-*/^=<>]", rest) is not None and re.search(r"[^\W\d_]{2}", rest) is None


def _equal_formulas(gold: str, predicted: str) -> bool:
    try:
        from math_verify import parse, verify
        from math_verify.errors import TimeoutException
    except ImportError:
        return False
    if threading.current_thread() is not threading.main_thread():
        warnings.warn("math-verify only works in the main thread, so formulas are compared as text.", stacklevel=2)
        return False
    if max(len(gold), len(predicted)) > MAX_FORMULA_LENGTH:
        return False
    try:
        return bool(verify(parse(_in_dollars(gold)), parse(_in_dollars(predicted))))
    # A model's output can make sympy raise anything; the timeout is not an Exception
    except (Exception, TimeoutException):
        return False


def _in_dollars(text: str) -> str:
    """Put a formula in dollar signs, without which math-verify does not read LaTeX."""
    return f"${text}$" if _is_formula(text) and "$" not in text else text
