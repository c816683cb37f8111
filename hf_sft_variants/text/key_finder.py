"""Finds the key of a response, the answer without the reasoning: its characters, and its tokens."""

from dataclasses import dataclass

import regex

from ..errors import InputError
from .assistant_turns import RenderedExample, Turn
from .token_offsets import Span


class NoKeyError(InputError):
    """An example has no key, or more than one. The message says what was looked for."""


@dataclass(frozen=True)
class KeyFinder:
    """
    Finds the key in the words of an assistant's turn. It starts as follows and extends to the end of the words:

    - with `key_pattern`: where the group `key` of the only match starts,
    - with `key_delimiter`: with its only occurrence (or after it, without `key_tags_in_loss`),
    - otherwise: after the closing thinking tag. Without `key_tags_in_loss` the tags and the white space around the
      answer are left out.

    Raises a [`NoKeyError`] unless each tag, the delimiter, or the pattern is found exactly once, the tags are in order
    with only white space between reasoning and answer, and the answer is not empty. `key_turns` is `"last"` or
    `"all"`, the turns of an example that are looked at.
    """

    thinking_tags: tuple[str, ...]
    answer_tags: tuple[str, ...]
    key_delimiter: str | None
    key_pattern: str | None
    key_tags_in_loss: bool = True
    key_turns: str = "last"

    def __call__(self, words: str) -> list[Span]:
        """Characters [start, end) of the key; the last span ends where `words` end."""
        if self.key_pattern is not None:
            return self._by_pattern(words)
        if self.key_delimiter is not None:
            return self._by_delimiter(words)
        return self._by_tags(words)

    def tokens_by_turn(self, example: RenderedExample) -> dict[Turn, list[int]]:
        """
        Tokens of the key of each turn that has one, with those that follow the turn's words up to its end. A token
        belongs to the key if any of its characters does: the `>` of `</Thinking>` may share a token with what follows.
        Raises a [`NoKeyError`] if no turn has a key.
        """
        turns = example.turns[-1:] if self.key_turns == "last" else example.turns
        if not turns:
            raise NoKeyError("there is no assistant turn with text (in messages, a turn with the role 'assistant')")
        tokens, problem = {}, None
        for turn in turns:
            try:
                spans = self(example.text[slice(*turn.content)])
            except NoKeyError as found:
                problem = found
                continue
            start = turn.content[0]
            in_spans = [i for first, last in spans for i in example.tokens_in((start + first, start + last))]
            after_words = max(example.tokens_in(turn.content)) + 1
            tokens[turn] = in_spans + list(range(after_words, turn.end_token))
        if not tokens:
            raise problem
        return tokens

    def looks_for(self, token: str) -> bool:
        """Whether a token is part of what shows where the key is, and so does not end a turn even if it is special."""
        texts = (*self.thinking_tags, *self.answer_tags, self.key_delimiter or "", self.key_pattern or "")
        return any(token in text for text in texts)

    def _by_pattern(self, words: str) -> list[Span]:
        matches = list(regex.finditer(self.key_pattern, words))
        _require_one(len(matches), f"`key_pattern={self.key_pattern!r}`")
        start, end = matches[0].span("key")
        _require_text(words[max(start, 0) : max(end, 0)], "the group `key` of `key_pattern`")
        return [(start, len(words))]

    def _by_delimiter(self, words: str) -> list[Span]:
        _require_one(words.count(self.key_delimiter), f"`key_delimiter={self.key_delimiter!r}`")
        start = words.index(self.key_delimiter)
        end = start + len(self.key_delimiter)
        _require_text(words[end:], f"the text after {self.key_delimiter!r}")
        return [(start if self.key_tags_in_loss else end, len(words))]

    def _by_tags(self, words: str) -> list[Span]:
        tags = (*self.thinking_tags, *self.answer_tags)
        for tag in tags:
            _require_one(words.count(tag), f"the tag {tag!r}")
        opened_thinking, closed_thinking, opened_answer, closed_answer = map(words.index, tags)
        if not opened_thinking < closed_thinking < opened_answer < closed_answer:
            raise NoKeyError(f"the tags {', '.join(map(repr, tags))} are not in this order")
        end_of_thinking = closed_thinking + len(tags[1])
        if words[end_of_thinking:opened_answer].strip():
            raise NoKeyError(f"there is text between {tags[1]!r} and {tags[2]!r}, where only white space may be")
        answer = words[opened_answer + len(tags[2]) : closed_answer]
        _require_text(answer, f"the text between {tags[2]!r} and {tags[3]!r}")
        if self.key_tags_in_loss:
            return [(end_of_thinking, len(words))]
        start = opened_answer + len(tags[2]) + len(answer) - len(answer.lstrip())
        return [(start, start + len(answer.strip())), (closed_answer + len(tags[3]), len(words))]


def _require_one(count: int, what: str) -> None:
    if count != 1:
        raise NoKeyError(f"{what} is not there" if count == 0 else f"{what} is there {count} times, not once")


def _require_text(key: str, what: str) -> None:
    if not key.strip():
        raise NoKeyError(f"{what} is empty")


def check_pattern(name: str, pattern: str) -> None:
    """Refuse what is not a regular expression with a group `key`."""
    try:
        groups = regex.compile(pattern).groupindex
    except regex.error as error:
        raise InputError(f"`{name}={pattern!r}` is not a regular expression: {error}.") from error
    if "key" not in groups:
        raise InputError(f"`{name}={pattern!r}` has no group named `key`: write (?P<key>...) around the answer.")
