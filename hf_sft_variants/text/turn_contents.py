"""Finds the content of each turn in a rendered conversation, by rendering modified versions of the conversation."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from .token_offsets import Span, common_length


Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class ContentFinder:
    """
    Finds the content of turns in a rendered conversation. `render` applies the chat template to messages, and
    `special_texts` are the special tokens that may end a turn.
    """

    render: Callable[..., str]
    special_texts: tuple[str, ...]

    def find_contents(self, messages: Messages, numbers: list[int], text: str) -> list[Span | None]:
        """
        Find the content of the messages with the given numbers in `text`, the rendered conversation. Returns their
        characters, with `None` for a message whose content the template leaves out.
        """
        for words_of in (str, str.strip):
            contents = self._by_marks(messages, numbers, text, words_of)
            if contents is not None:
                return contents
        if len(numbers) > 1:
            return [content for i in numbers for content in self.find_contents(messages, [i], text)]
        content = self._by_prefixes(messages, numbers[0], text)
        if content is not None:
            return [content]
        return self._by_marks(messages, numbers, text, _without_reasoning) or [None]

    def _by_marks(
        self, messages: Messages, numbers: list[int], text: str, words_of: Callable[[str], str]
    ) -> list[Span] | None:
        """
        Render with a mark before and after the content of each turn, which is exact for any template that copies it.

        Templates may trim the content or drop the reasoning, so the marks may also enclose only a part of it. `None`
        if the template changes more than that, so that removing the marks does not restore the text.
        """
        everything = text + json.dumps(messages, ensure_ascii=False, default=str)
        opening, closing = [mark for mark in map(chr, range(0xE000, 0xE200)) if mark not in everything][:2]
        marked = list(messages)
        for i in numbers:
            before, words, after = messages[i]["content"].rpartition(words_of(messages[i]["content"]) or opening)
            marked[i] = {**messages[i], "content": f"{before}{opening}{words}{closing}{after}"}
        pieces = self.render(marked).split(opening)
        turns = [piece.split(closing) for piece in pieces[1:]]
        if len(turns) != len(numbers) or any(len(turn) != 2 for turn in turns) or closing in pieces[0]:
            return None
        contents, start = [], len(pieces[0])
        for words, rest in turns:
            contents.append((start, start + len(words)))
            start += len(words) + len(rest)
        return contents if pieces[0] + "".join(map("".join, turns)) == text else None

    def _by_prefixes(self, messages: Messages, number: int, text: str) -> Span | None:
        """
        Return what the template adds to the conversation for a turn, without the special token that ends it. This
        works for templates that rewrite the content. `None` if the turn is rendered differently once others follow.
        """
        before, through = self._render_part(messages[:number]), self._render_part(messages[: number + 1])
        prompted = self._render_part(messages[:number], add_generation_prompt=True)
        start = common_length(prompted, text)
        words = through[start:].rstrip()
        parts_begin_text = all(text.startswith(part.rstrip()) for part in (before, through))
        if not parts_begin_text or bool(before) != (number > 0) or start < len(before.rstrip()) or not words:
            return None
        turn_end = max((special for special in self.special_texts if words.endswith(special)), key=len, default="")
        if words == turn_end:
            return None
        return start, start + len(words) - len(turn_end) if turn_end else len(through)

    def find_turn_end(self, messages: Messages, number: int, text: str, content_end: int) -> int:
        """Find the end of a turn, including what the template adds after its content."""
        if number == len(messages) - 1:
            return len(text)
        through = self._render_part(messages[: number + 1])
        if not through:
            return content_end
        if text.startswith(through):
            return len(through)
        # The template renders the last turn of a conversation differently, but ends it like the others
        (content,) = self.find_contents(messages[: number + 1], [number], through)
        return content_end + common_length(through[content[1] :] if content else "", text[content_end:])

    def find_messages(self, messages: Messages, contents: dict[int, Span | None], text: str) -> list[Span | None]:
        """
        Find each message in `text` with everything that the template adds to it, its header included. `contents` has
        the content of those that have words. `None` for a message whose bounds are not certain.
        """
        spans: list[Span | None] = []
        start: int | None = 0
        for i in range(len(messages)):
            end = self._find_message_end(messages, i, text, contents.get(i))
            span = None if start is None or end is None else (start, end)
            # Templates may write the words of one message into another
            if span is not None and not _has_parts(messages[i], text[slice(*span)]):
                span = end = None
            is_certain = span is not None and all(_is_in_place(j == i, words, span) for j, words in contents.items())
            spans.append(span if is_certain else None)
            start = end
        return spans

    def _find_message_end(self, messages: Messages, number: int, text: str, content: Span | None) -> int | None:
        """End of a message; `None` if it is not certain, where [`find_turn_end`] takes the longest common ending."""
        if number == len(messages) - 1:
            return len(text)
        through = self._render_part(messages[: number + 1])
        if through and text.startswith(through):
            return len(through)
        if content is None or not through:
            return None
        (in_part,) = self.find_contents(messages[: number + 1], [number], through)
        words = text[slice(*content)]  # perhaps without the reasoning that is in `through`
        if in_part is None or not through[slice(*in_part)].endswith(words):
            return None
        tail, rest = through[in_part[1] :], text[content[1] :]
        if rest.startswith(tail):
            return content[1] + len(tail)
        # A template may write more special tokens after the last message than after others; the first one ends it
        special = rf"\s*(?:{'|'.join(map(re.escape, self.special_texts))})\s*"
        ending = re.match(special, rest)
        return content[1] + ending.end() if ending and re.fullmatch(f"(?:{special})+", tail) else None

    def _render_part(self, messages: Messages, **options: Any) -> str:
        """Render the first messages of a conversation; empty if the template rejects them, e.g. without a question."""
        try:
            return self.render(messages, **options) if messages else ""
        except TemplateError:
            return ""


def _has_parts(message: dict[str, Any], text: str) -> bool:
    """Whether a text has all parts of a message's content; a content that is a single text has none."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return all((part.get("text") or "").strip() in text for part in parts)


def _is_in_place(is_own: bool, content: Span | None, span: Span) -> bool:
    """Whether a message's own content is inside its span, or another's outside it."""
    if content is None:
        return not is_own
    return span[0] <= content[0] <= content[1] <= span[1] if is_own else content[1] <= span[0] or span[1] <= content[0]


def _without_reasoning(content: str) -> str:
    return content.rpartition("</think>")[2].strip()
