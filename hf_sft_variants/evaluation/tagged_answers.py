"""Writes and reads tagged responses: `<Thinking>reasoning</Thinking>`, then `<Answer>answer</Answer>`."""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, permutations
from typing import NamedTuple

from ..errors import InputError
from .answers import ANSWER_MARK, NUMBER, extract_answer, extract_boxed
from .matching import PART_OF_FORMULA_AFTER


THINKING_TAGS = ("<Thinking>", "</Thinking>")
ANSWER_TAGS = ("<Answer>", "</Answer>")

# Tags other than the four, e.g. misspelled ones: a malformed answer ends at the first such closing tag
FOREIGN_CLOSING = re.compile(r"<\s*(?:/|\Z)")
FOREIGN_OPENING = re.compile(r"<\s*[A-Za-z]\w*\s*>")
# Drops Markdown's bold; only a full stop before white space ends the sentence, so "$3.50" does not
SENTENCE = re.compile(r"\banswer\s*(?:is\b\s*:?|:|=)[\s*]*(\S.*?)\**(?:\.?\s*$|\.\s)", re.IGNORECASE | re.MULTILINE)


class _Tag(NamedTuple):
    kind: str | None
    start: int
    end: int


def tagged_response(
    reasoning: str,
    answer: str,
    thinking_tags: Sequence[str] = THINKING_TAGS,
    answer_tags: Sequence[str] = ANSWER_TAGS,
) -> str:
    """
    Write a tagged response, e.g. `"<Thinking>1 + 1 = 2</Thinking>\\n<Answer>2</Answer>"`: one newline between the
    blocks and no other added white space. Raises an `InputError` unless the tags are two pairs of strings, none of
    which contains another.
    """
    check_tags(thinking_tags, answer_tags)
    return f"{thinking_tags[0]}{reasoning}{thinking_tags[1]}\n{answer_tags[0]}{answer}{answer_tags[1]}"


def follows_format(
    text: str, thinking_tags: Sequence[str] = THINKING_TAGS, answer_tags: Sequence[str] = ANSWER_TAGS
) -> bool:
    """
    Whether a text is exactly one tagged response: a non-empty reasoning block and a non-empty answer block, with only
    white space around them, and each of the four tags exactly once and in its exact case.
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
    Find the answer of a response whose tags may be malformed or missing, without surrounding white space.

    A model can give the right answer in the wrong format, so the two are measured independently. Tags match in any
    case and with white space inside (`< answer >`). The answer is the first of the following that is not blank:

    1. The last complete answer block. The last one is used because a model may correct itself; complete blocks take
       precedence over incomplete ones because a generation may be cut off anywhere.
    2. The text after the last opening answer tag, up to the next tag or any closing tag. This covers a closing tag
       that is missing, misspelled, or written as another opening tag.
    3. The text after the last closing thinking tag, with the same end. This covers an answer without tags.
    4. The last line before a closing answer tag. This covers a missing opening tag.
    5. Otherwise, an answer that the text itself marks: the number right after the last `####`, else the last
       `\\boxed{}`, else the text after the last "answer is" (or "answer:"), else the line after the last `####`.

    The text found by 3 and 4 is also searched for the marks of 5. Text inside answer tags is not: it is the answer as
    the model wrote it.
    """
    check_tags(thinking_tags, answer_tags)
    pattern = _any_tag(*thinking_tags, *answer_tags)
    tags = [_Tag(match.lastgroup, *match.span()) for match in pattern.finditer(text)]
    for find in (_complete_blocks, _after_openings, _after_thinking, _before_closings):
        for found in find(text, tags):
            if found.strip():
                return found.strip()
    return _marked_answer(text)


def _complete_blocks(text: str, tags: list[_Tag]) -> Iterator[str]:
    """Yield the last block first. A block that contains other tags is split at them, with the last part first."""
    blocks, start = [], None
    for i, tag in enumerate(tags):
        if tag.kind == "answer":
            start = i
        elif tag.kind == "end_answer" and start is not None:
            blocks.append(tags[start : i + 1])
            start = None
    for block in reversed(blocks):
        yield from reversed([text[before.end : after.start] for before, after in pairwise(block)])


def _after_openings(text: str, tags: list[_Tag]) -> Iterator[str]:
    return (_without_foreign_tags(part) for part in _parts_after(text, tags, "answer"))


def _after_thinking(text: str, tags: list[_Tag]) -> Iterator[str]:
    for part in _parts_after(text, tags, "end_thinking"):
        yield _marked_answer(part) or _without_foreign_tags(part)


def _before_closings(text: str, tags: list[_Tag]) -> Iterator[str]:
    for before, tag in zip([None, *tags], tags, strict=False):
        if tag.kind == "end_answer":
            lines = text[before.end if before else 0 : tag.start].split("\n")
            line = next((line for line in reversed(lines) if line.strip()), "")
            yield _marked_answer(line) or FOREIGN_OPENING.split(line)[-1]


def _parts_after(text: str, tags: list[_Tag], kind: str) -> Iterator[str]:
    """Return the text between each tag of a kind and the next tag, last first."""
    ends = [*(tag.start for tag in tags[1:]), len(text)]
    return (text[tag.end : end] for tag, end in reversed(list(zip(tags, ends, strict=False))) if tag.kind == kind)


def _without_foreign_tags(part: str) -> str:
    part = FOREIGN_CLOSING.split(part, maxsplit=1)[0].strip()
    match = FOREIGN_OPENING.match(part)
    return part[match.end() :] if match else part


def _marked_answer(text: str) -> str | None:
    _, mark, tail = text.rpartition(ANSWER_MARK)
    line = _without_foreign_tags(tail.split("\n", 1)[0]) if mark else ""
    # Markdown has headings such as "#### Step 2": only a number right after the mark takes precedence
    number = NUMBER.match(line)
    after = line[number.end() :].lstrip() if number else ""
    if number and not after.startswith("/") and not PART_OF_FORMULA_AFTER.match(line, number.end()):
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
                f"{other!r}: pass four tags, none of which contains another."
            )
