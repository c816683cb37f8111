"""The data sets of the paper as prompts, reasonings and answers: a rule each."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from hf_sft_variants.errors import InputError
from hf_sft_variants.evaluation.answers import ANSWER_MARK
from hf_sft_variants.evaluation.tagged_answers import ANSWER_TAGS, THINKING_TAGS


# `<<48/2=24>>`, which GSM8K writes for a calculator that the model would call
CALCULATOR = re.compile(r"<<.*?>>")
THINK, END_THINK = "<think>", "</think>"


class Converted(NamedTuple):
    """A row as the trainer needs it, or `None` and why it is dropped."""

    row: dict[str, Any] | None
    reason: str | None = None


class PaperData(NamedTuple):
    """Where a data set of the paper is on the Hub, the columns that are read, and the rule for a row."""

    source: str
    subset: str | None
    revision: str | None
    columns: tuple[str, ...]
    convert: Callable[[dict], Converted]


def gsm8k(row: dict) -> Converted:
    """The solution before `####` without calculator marks is the reasoning, what follows the answer."""
    solution = _text(row, "answer")
    if solution.count(ANSWER_MARK) != 1:
        return Converted(None, f"its `answer` has no {ANSWER_MARK}, or several")
    reasoning, _, answer = solution.partition(ANSWER_MARK)
    return _converted(_text(row, "question"), CALCULATOR.sub("", reasoning), answer)


def openr1_math(row: dict) -> Converted:
    """
    The `<think>` block of the first verified generation that has a whole one is the reasoning, `answer` the answer.

    What a generation says behind its `<think>` block is its own answer, a summary that ends in the boxed result: the
    row's `answer` stands in its place. The block itself is left as it is, results that it names included.
    """
    generations, verified = _list(row, "generations"), _list(row, "correctness_math_verify")
    candidates = [text for text, right in zip(generations, verified, strict=False) if right and text]
    if not candidates:
        return Converted(None, "no generation is verified by math-verify")
    block = next(filter(None, map(_think_block, candidates)), None)
    if block is None:
        return Converted(None, "no verified generation has one whole <think> block")
    return _converted(_text(row, "problem"), block, _text(row, "answer"))


def cot_collection(row: dict) -> Converted:
    """`source` is the prompt, `rationale` the reasoning, `target` the answer."""
    return _converted(_text(row, "source"), _text(row, "rationale"), _text(row, "target"))


def openbookqa(row: dict) -> Converted:
    """`fact1` is the reasoning, letter and text of the right choice are the answer."""
    choices = row["choices"]
    try:
        labelled = list(zip(choices["label"], choices["text"], strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"`choices` is {choices!r}: pass {{'text': [...], 'label': [...]}}, equally long.") from error
    lines = {label: f"({label}) {text}" for label, text in labelled}
    key = _text(row, "answerKey")
    if key not in lines:
        return Converted(None, "its `answerKey` is none of its choices")
    return _converted("\n".join([_text(row, "question_stem"), *lines.values()]), _text(row, "fact1"), lines[key])


PAPER_DATA = {
    "gsm8k": PaperData("openai/gsm8k", "main", None, ("question", "answer"), gsm8k),
    "openr1-math": PaperData(
        "open-r1/OpenR1-Math-220k",
        "default",  # the authors' choice for fine-tuning; "all" has the whole 220k
        None,
        ("problem", "answer", "generations", "correctness_math_verify"),
        openr1_math,
    ),
    "cot-collection": PaperData(
        "kaist-ai/CoT-Collection",
        None,
        "refs/convert/parquet",  # the main branch has a loading script, which `datasets` no longer runs
        ("source", "rationale", "target"),
        cot_collection,
    ),
    "openbookqa": PaperData(
        "allenai/openbookqa",
        "additional",  # the subset with `fact1`
        None,
        ("question_stem", "choices", "answerKey", "fact1"),
        openbookqa,
    ),
}


def _converted(question: str, reasoning: str, answer: str) -> Converted:
    """A row of three texts without white space around them, unless one of them is of no use."""
    parts = {"question": question.strip(), "reasoning": reasoning.strip(), "answer": answer.strip()}
    for name, text in parts.items():
        if not text:
            return Converted(None, f"its {name} is blank")
    for name in ("reasoning", "answer"):
        tag = next((tag for tag in (*THINKING_TAGS, *ANSWER_TAGS) if tag in parts[name]), None)
        if tag is not None:
            return Converted(None, f"its {name} has the tag {tag}")
    prompt = [{"role": "user", "content": parts.pop("question")}]
    return Converted({"prompt": prompt, **parts})


def _think_block(text: str) -> str | None:
    """What stands in the only block of a text that begins with it."""
    before, opening, rest = text.partition(THINK)
    block, closing, behind = rest.partition(END_THINK)
    is_whole = opening and closing and not before.strip()
    return block if is_whole and not any(tag in block + behind for tag in (THINK, END_THINK)) else None


def _text(row: dict, column: str) -> str:
    """A text, blank where there is none."""
    value = "" if row[column] is None else row[column]
    if not isinstance(value, str):
        raise InputError(f"`{column}` is {value!r}: pass a text.")
    return value


def _list(row: dict, column: str) -> list:
    """A list, empty where there is none."""
    value = [] if row[column] is None else row[column]
    if not isinstance(value, list):
        raise InputError(f"`{column}` is {value!r}: pass a list.")
    return value
