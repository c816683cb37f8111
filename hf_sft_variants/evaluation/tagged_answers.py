"""Responses that are tagged `<Thinking>reasoning</Thinking>`, `<Answer>answer</Answer>`, and reading their answers."""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, permutations
from typing import NamedTuple

from ..errors import InputError
from .answers import ANSWER_MARK, NUMBER, extract_answer, extract_boxed
from .matching import PART_OF_FORMULA_BEHIND


THINKING_TAGS = ("<Thinking>", "</Thinking>")
ANSWER_TAGS = ("<Answer>", "</Answer>")

# A tag that is none of the four, e.g. misspelt: the text behind a malformed answer ends at the first that closes
FOREIGN_CLOSING = re.compile(r"<\s*(?:/|\Z)")
FOREIGN_OPENING = re.compile(r"<\s*[A-Za-z]\w*\s*>")
# Markdown's bold is left out; the sentence ends at a full stop with white space behind it, so "$3.50" goes on
SENTENCE = re.compile(r"\banswer\s*(?:is\b\s*:?|:|=)[\s*]*(\S.*?)\**(?:\.?\s*$|\.\s)", re.IGNORECASE | re.MULTILINE)


class _Tag(NamedTuple):
    kind: str
    start: int
    end: int


def tagged_response(
    reasoning: str,
    answer: str,
    thinking_tags: Sequence[str] = THINKING_TAGS,
    answer_tags: Sequence[str] = ANSWER_TAGS,
) -> str:
    """
    Writes a reasoning and an answer as one tagged response: one newline between the blocks, no other white space.

    Args:
        reasoning (`str`):
            The reasoning, taken as it is.
        answer (`str`):
            The answer, taken as it is.
        thinking_tags (`Sequence[str]`, *optional*, defaults to `("<Thinking>", "</Thinking>")`):
            Opening and closing tag of the reasoning.
        answer_tags (`Sequence[str]`, *optional*, defaults to `("<Answer>", "</Answer>")`):
            Opening and closing tag of the answer.

    Returns:
        `str`: The response, e.g. `"<Thinking>1 + 1 = 2</Thinking>\\n<Answer>2</Answer>"`.

    Raises:
        InputError: If `thinking_tags` or `answer_tags` is no pair of strings, or a tag is in another.
    """
    check_tags(thinking_tags, answer_tags)
    return f"{thinking_tags[0]}{reasoning}{thinking_tags[1]}\n{answer_tags[0]}{answer}{answer_tags[1]}"


def follows_format(
    text: str, thinking_tags: Sequence[str] = THINKING_TAGS, answer_tags: Sequence[str] = ANSWER_TAGS
) -> bool:
    """
    Whether a text is a tagged response and nothing else: reasoning block, answer block, neither empty, white space
    around them at most, and each of the four tags exactly once, in the case it was asked for.

    Args:
        text (`str`):
            A generated text.
        thinking_tags (`Sequence[str]`, *optional*, defaults to `("<Thinking>", "</Thinking>")`):
            Opening and closing tag of the reasoning.
        answer_tags (`Sequence[str]`, *optional*, defaults to `("<Answer>", "</Answer>")`):
            Opening and closing tag of the answer.

    Returns:
        `bool`: Whether the text has the format.

    Raises:
        InputError: If `thinking_tags` or `answer_tags` is no pair of strings, or a tag is in another.
    """
    check_tags(thinking_tags, answer_tags)
    tags = (*thinking_tags, *answer_tags)
    if any(text.count(tag) != 1 for tag in tags):
        return False
    think, end_think, answer, end_answer = map(re.escape, tags)
    pattern = rf"\A\s*{think}(.+?){end_think}\s*{answer}(.+?){end_answer}\s*\Z"
    return re.search(pattern, text, re.DOTALL) is not None


def extract_tagged_answer(
    text: str, thinking_tags: Sequence[str] = THINKING_TAGS, answer_tags: Sequence[str] = ANSWER_TAGS
) -> str | None:
    """
    Finds the answer of a response whose tags may be malformed or missing.

    A model can answer right and format wrong, and the two are measured apart. Tags count in any case and with white
    space in them (`< answer >`). The first of these that is not blank is the answer:

    1. The last complete answer block. Of several the last counts, because it is what the model settled on; a block
       that is complete goes before one that is not, because a generation may be cut anywhere.
    2. What follows the last opening answer tag, up to the next tag or closing tag of any name: the closing tag is
       missing, misspelt or another opening one.
    3. What follows the last closing thinking tag, up to the same: the answer stands there without its tags.
    4. The last line before a closing answer tag: the opening one is missing.
    5. Without any of these, what the text marks itself: the number right behind the last `####`, else the last
       `\\boxed{}`, else what stands behind the last "answer is" (or "answer:"), else the line behind the last `####`.

    A line or a remainder that 3. and 4. find is searched for the marks of 5., too. Text in the tags is not: it is the
    answer as the model wrote it.

    Args:
        text (`str`):
            A generated text.
        thinking_tags (`Sequence[str]`, *optional*, defaults to `("<Thinking>", "</Thinking>")`):
            Opening and closing tag of the reasoning.
        answer_tags (`Sequence[str]`, *optional*, defaults to `("<Answer>", "</Answer>")`):
            Opening and closing tag of the answer.

    Returns:
        `str` or `None`: The answer without white space around it, `None` where none is to be found.

    Raises:
        InputError: If `thinking_tags` or `answer_tags` is no pair of strings, or a tag is in another.
    """
    check_tags(thinking_tags, answer_tags)
    pattern = _any_tag(*thinking_tags, *answer_tags)
    tags = [_Tag(match.lastgroup, *match.span()) for match in pattern.finditer(text)]
    for find in (_complete_blocks, _behind_openings, _behind_thinking, _before_closings):
        for found in find(text, tags):
            if found.strip():
                return found.strip()
    return _marked_answer(text)


def _complete_blocks(text: str, tags: list[_Tag]) -> Iterator[str]:
    """From the last to the first; of a block with other tags in it the parts between them, again the last first."""
    blocks, start = [], None
    for i, tag in enumerate(tags):
        if tag.kind == "answer":
            start = i
        elif tag.kind == "end_answer" and start is not None:
            blocks.append(tags[start : i + 1])
            start = None
    for block in reversed(blocks):
        yield from reversed([text[before.end : after.start] for before, after in pairwise(block)])


def _behind_openings(text: str, tags: list[_Tag]) -> Iterator[str]:
    return (_without_foreign_tags(part) for part in _parts_behind(text, tags, "answer"))


def _behind_thinking(text: str, tags: list[_Tag]) -> Iterator[str]:
    for part in _parts_behind(text, tags, "end_thinking"):
        yield _marked_answer(part) or _without_foreign_tags(part)


def _before_closings(text: str, tags: list[_Tag]) -> Iterator[str]:
    for before, tag in zip([None, *tags], tags, strict=False):
        if tag.kind == "end_answer":
            lines = text[before.end if before else 0 : tag.start].split("\n")
            line = next((line for line in reversed(lines) if line.strip()), "")
            yield _marked_answer(line) or FOREIGN_OPENING.split(line)[-1]


def _parts_behind(text: str, tags: list[_Tag], kind: str) -> Iterator[str]:
    """What follows each tag of a kind, up to the next tag; from the last to the first."""
    ends = [*(tag.start for tag in tags[1:]), len(text)]
    return (text[tag.end : end] for tag, end in reversed(list(zip(tags, ends, strict=False))) if tag.kind == kind)


def _without_foreign_tags(part: str) -> str:
    part = FOREIGN_CLOSING.split(part, maxsplit=1)[0].strip()
    match = FOREIGN_OPENING.match(part)
    return part[match.end() :] if match else part


def _marked_answer(text: str) -> str | None:
    _, mark, tail = text.rpartition(ANSWER_MARK)
    line = _without_foreign_tags(tail.split("\n", 1)[0]) if mark else ""
    # Models that write Markdown have headings such as "#### Step 2": a number must come at once to go first
    number = NUMBER.match(line)
    behind = line[number.end() :].lstrip() if number else ""
    if number and not behind.startswith("/") and not PART_OF_FORMULA_BEHIND.match(line, number.end()):
        return extract_answer(mark + line)
    sentences = SENTENCE.findall(text)
    sentence = _without_foreign_tags(sentences[-1]) if sentences else ""
    return extract_boxed(text) or sentence or line or None


@lru_cache(maxsize=16)
def _any_tag(*tags: str) -> re.Pattern:
    kinds = ("thinking", "end_thinking", "answer", "end_answer")
    tolerant = [r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", tag))) for tag in tags]
    groups = (f"(?P<{kind}>{pattern})" for kind, pattern in zip(kinds, tolerant, strict=True))
    return re.compile("|".join(groups), re.IGNORECASE)


def check_tags(thinking_tags: Sequence[str], answer_tags: Sequence[str]) -> None:
    for name, tags in (("thinking_tags", thinking_tags), ("answer_tags", answer_tags)):
        are_strings = not isinstance(tags, str) and all(isinstance(tag, str) and tag.strip() for tag in tags)
        if not are_strings or len(tags) != 2:
            raise InputError(f"`{name}` is {tags!r}: pass an opening and a closing tag, e.g. {ANSWER_TAGS}.")
    for tag, other in permutations((*thinking_tags, *answer_tags), 2):
        if tag in other:
            raise InputError(
                f"`thinking_tags` is {thinking_tags!r} and `answer_tags` {answer_tags!r}, where {tag!r} is in "
                f"{other!r}: pass four tags of which none holds another."
            )
