"""Finds the assistant turns of an example that only has tokens, in the text that they decode to."""

import re
from collections.abc import Iterator
from functools import partial
from itertools import groupby

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .assistant_turns import RenderedExample, Turn
from .token_offsets import Span, TokenOffsets, common_length


_UNKNOWN_TURNS = (
    "the assistant turns can't be told from the others, because every token has a label and {}: pass messages, pass "
    "labels that are -100 except on the assistant's tokens, or set `key_turns='last'`"
)


def assistant_header(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> re.Pattern | None:
    """
    Build a pattern for what the chat template puts before an assistant turn; `None` if there is no template or no
    header. It is the part of the generation prompt that completed turns also begin with or, if the template has no
    generation prompt, the text between a question and its answer. White space is optional, because not every tokenizer
    preserves it.
    """
    if not (chat_template or tokenizer.chat_template):
        return None
    render = partial(tokenizer.apply_chat_template, tokenize=False, chat_template=chat_template)
    question, answer = "2718281828", "3141592653"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        asked, prompted, text = render(turns[:1]), render(turns[:1], add_generation_prompt=True), render(turns * 2)
    except TemplateError:
        return None
    header = prompted[len(asked) : common_length(prompted, text)] if prompted.startswith(asked) else ""
    if not header.strip():
        between = re.search(f"{question}(.*?){answer}", text, re.DOTALL)
        header = between[1] if between else ""
    if not header.strip():
        return None
    characters = r"\s*".join(map(re.escape, "".join(header.split())))
    return re.compile(f"{characters}(?:{re.escape(header[len(header.rstrip()) :])})?")


def decode_example(
    token_offsets: TokenOffsets,
    special: set[int],
    header: re.Pattern | None,
    token_ids: list[int],
    labels: list[int],
    every_turn: bool,
) -> RenderedExample:
    """
    Decode the tokens of an example and find the assistant turns: runs of labelled tokens that follow the assistant's
    `header` and end with one of the `special` tokens. If the text has no header, every run is taken for a turn. With
    `every_turn`, an `InputError` is raised if the turns can't be told from the others; without it, the last one is
    enough, which works in more cases.
    """
    text, offsets = token_offsets(token_ids)
    headers = [match.end() for match in header.finditer(text)] if header else []
    turns = []
    for start, end, after_special in _labelled_runs(token_ids, labels, special, offsets):
        first, last = offsets[start][0], offsets[end - 1][1]
        own_headers = [position for position in headers if after_special <= position < last]
        if every_turn and sum(position > first for position in own_headers) > 1:
            raise InputError(_UNKNOWN_TURNS.format("no special token ends them"))
        if own_headers:
            first = max(first, own_headers[-1])
        if text[first:last].strip() and (own_headers or not headers):
            is_ended = end < len(token_ids) and labels[end] != -100  # by a special token
            turns.append(Turn((first, last), end + is_ended))
    if every_turn and not headers and len(turns) > 1 and -100 not in labels:
        raise InputError(_UNKNOWN_TURNS.format("none begins with the chat template's header"))
    return RenderedExample(text, token_ids, offsets, turns)


def _labelled_runs(
    token_ids: list[int], labels: list[int], special: set[int], offsets: list[Span]
) -> Iterator[tuple[int, int, int]]:
    """Yield runs [start, end) of labelled ordinary tokens, each with the end of the last special token before it."""
    after_special = 0
    kinds = [(token_id in special, label != -100) for token_id, label in zip(token_ids, labels, strict=True)]
    for (is_special, has_label), run in groupby(range(len(kinds)), key=kinds.__getitem__):
        numbers = list(run)
        if is_special:
            after_special = offsets[numbers[-1]][1]
        elif has_label:
            yield numbers[0], numbers[-1] + 1, after_special
