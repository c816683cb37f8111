"""Where a chat template puts the words of a conversation's turns, found by rendering it again and again."""

import json
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from .token_offsets import Span


Render = Callable[..., str]
Messages = list[dict[str, Any]]


def find_contents(
    render: Render, messages: Messages, spoken: list[int], text: str, special_texts: tuple[str, ...]
) -> list[Span | None]:
    """Characters of each turn's words; `None` for a turn whose words the template hides."""
    for words_of in (str, str.strip):
        contents = _contents_by_marks(render, messages, spoken, text, words_of)
        if contents is not None:
            return contents
    if len(spoken) > 1:
        return [content for i in spoken for content in find_contents(render, messages, [i], text, special_texts)]
    content = _content_by_prefixes(render, messages, spoken[0], text, special_texts)
    if content is not None:
        return [content]
    return _contents_by_marks(render, messages, spoken, text, _without_reasoning) or [None]


def _without_reasoning(content: str) -> str:
    return content.rpartition("</think>")[2].strip()


def _contents_by_marks(
    render: Render, messages: Messages, spoken: list[int], text: str, words_of: Callable[[str], str]
) -> list[Span] | None:
    """
    Render with a mark before and after the words of each turn: exact in any template that copies them.

    Templates may trim the words, or leave out reasoning, so the marks can stand around a part of them. `None` if the
    template does more: without its marks the text has to be the text.
    """
    everything = text + json.dumps(messages, ensure_ascii=False, default=str)
    opening, closing = [mark for mark in map(chr, range(0xE000, 0xE200)) if mark not in everything][:2]
    marked = list(messages)
    for i in spoken:
        before, words, after = messages[i]["content"].rpartition(words_of(messages[i]["content"]) or opening)
        marked[i] = {**messages[i], "content": f"{before}{opening}{words}{closing}{after}"}
    pieces = render(marked).split(opening)
    turns = [piece.split(closing) for piece in pieces[1:]]
    if len(turns) != len(spoken) or any(len(turn) != 2 for turn in turns) or closing in pieces[0]:
        return None
    contents, start = [], len(pieces[0])
    for words, rest in turns:
        contents.append((start, start + len(words)))
        start += len(words) + len(rest)
    return contents if pieces[0] + "".join(map("".join, turns)) == text else None


def _content_by_prefixes(
    render: Render, messages: Messages, number: int, text: str, special_texts: tuple[str, ...]
) -> Span | None:
    """
    What the template adds to the conversation for a turn, without the special token that ends it: for templates that
    rewrite the words. `None` if they look otherwise once other turns follow.
    """
    before = _render_part(render, messages[:number])
    through = _render_part(render, messages[: number + 1])
    start = common_length(_render_part(render, messages[:number], add_generation_prompt=True), text)
    words = through[start:].rstrip()
    is_start_of_text = bool(before) == (number > 0) and all(
        text.startswith(part.rstrip()) for part in (before, through)
    )
    if not is_start_of_text or start < len(before.rstrip()) or not words:
        return None
    turn_end = max((special for special in special_texts if words.endswith(special)), key=len, default="")
    if words == turn_end:
        return None
    return start, start + len(words) - len(turn_end) if turn_end else len(through)


def find_turn_end(
    render: Render,
    messages: Messages,
    number: int,
    text: str,
    content_end: int,
    special_texts: tuple[str, ...],
) -> int:
    """Where a turn ends with what the template puts behind its words, and the next one begins."""
    if number == len(messages) - 1:
        return len(text)
    through = _render_part(render, messages[: number + 1])
    if not through:
        return content_end
    if text.startswith(through):
        return len(through)
    # The template writes the last turn of a conversation in another way, but ends it as any other
    (content,) = find_contents(render, messages[: number + 1], [number], through, special_texts)
    return content_end + common_length(through[content[1] :] if content else "", text[content_end:])


def _render_part(render: Render, messages: Messages, **options: Any) -> str:
    """Render the start of a conversation; an empty text if the template refuses it, as without a question."""
    try:
        return render(messages, **options) if messages else ""
    except TemplateError:
        return ""


def common_length(first: str, second: str) -> int:
    if second.startswith(first):
        return len(first)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
