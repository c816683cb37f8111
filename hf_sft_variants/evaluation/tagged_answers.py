"""Writing and reading tagged responses: `<Thinking>reasoning</Thinking>`, then `<Answer>answer</Answer>`."""

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

# A tag other than the four, e.g. misspelt: the text of a malformed answer ends at the first one that closes
FOREIGN_CLOSING = re.compile(r"<\s*(?:/|\Z)")
FOREIGN_OPENING = re.compile(r"<\s*[A-Za-z]\w*\s*>")
# Without Markdown's bold; the sentence ends at a full stop followed by white space, so "$3.50" does not end it
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
    Write a tagged response, e.g. `"<Thinking>1 + 1 = 2</Thinking>\\n<Answer>2</Answer>"`: one newline between the
    blocks, no other white space.

    Raises:
        `InputError`: If `thinking_tags` or `answer_tags` is not a pair of strings, or a tag contains another.
    """
    check_tags(thinking_tags, answer_tags)
    return f"{thinking_tags[0]}{reasoning}{thinking_tags[1]}\n{answer_tags[0]}{answer}{answer_tags[1]}"


def follows_format(
    text: str, thinking_tags: Sequence[str] = THINKING_TAGS, answer_tags: Sequence[str] = ANSWER_TAGS
) -> bool:
    """
    Whether a text is a tagged response and nothing else: a non-empty reasoning block, a non-empty answer block, only
    white space around them, and each of the four tags exactly once with its exact case.
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
    Find the answer of a response whose tags may be malformed or missing.

    A model can give the right answer in the wrong format, so the two are measured independently. Tags match in any
    case and with white space inside (`< answer >`). The first of these that is not blank is the answer:

    1. The last complete answer block. The last counts, because a model may correct itself; complete blocks come
       before incomplete ones, because a generation may be cut off anywhere.
    2. The text after the last opening answer tag, up to the next tag or closing tag of any name: the closing tag is
       missing, misspelt or another opening one.
    3. The text after the last closing thinking tag, up to the same: the answer has no tags.
    4. The last line before a closing answer tag: the opening one is missing.
    5. Without any of these, an answer that the text itself marks: the number right after the last `####`, else the
       last `\\boxed{}`, else the text after the last "answer is" (or "answer:"), else the line after the last `####`.

    The text found by 3. and 4. is also searched for the marks of 5. Text inside answer tags is not: it is the answer
    as the model wrote it.

    Returns:
        `str` or `None`: The answer without surrounding white space, `None` if there is none.
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
    """Last block first; a block that contains other tags is split into the parts between them, last part first."""
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
    """The text between each tag of a kind and the next tag, last first."""
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
                f"{other!r}: pass four tags of which none contains another."
            )
