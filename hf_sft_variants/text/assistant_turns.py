"""Renders an example as text and finds the assistant's turns: their content, and the token that ends each one."""

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from ..errors import InputError
from .special_tokens import special_token_ids
from .token_offsets import Span, tokenize_with_offsets
from .turn_contents import ContentFinder


@dataclass(frozen=True)
class Turn:
    """
    Assistant turn: the characters of its content, and the index of the first token after the turn has ended.
    """

    content: Span
    end_token: int


@dataclass(frozen=True)
class RenderedExample:
    """
    Example as the model reads it: the text, including what the chat template adds; the tokens, with the characters
    [start, end) that each covers (an empty span if none); and the assistant turns with content, in order.
    """

    text: str
    token_ids: list[int]
    offsets: list[Span]
    turns: list[Turn]

    def tokens_in(self, span: Span) -> list[int]:
        """Indices of the tokens that cover any of the characters [start, end)."""
        return [i for i, (start, end) in enumerate(self.offsets) if start < span[1] and end > span[0]]


def render_example(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: str | None, text_field: str
) -> RenderedExample:
    """
    Render and tokenize a row as `SFTTrainer` does, and find the assistant turns.

    The row has `messages`, `prompt` and `completion`, or a text in `text_field`; texts end with the end-of-sequence
    token that [`~trl.SFTTrainer`] has added. The chat template defaults to the tokenizer's. Raises an `InputError` if
    the assistant's text can't be found in the rendered text.
    """
    if is_conversational(example):
        options = template_options(example, chat_template)
        return render_conversation(tokenizer, messages_of(example), len(example.get("prompt", [])), **options)
    if "prompt" in example:
        return render_text(tokenizer, example["prompt"], example["completion"])
    return render_text(tokenizer, "", example[text_field])


def messages_of(example: dict[str, Any]) -> list[dict[str, Any]]:
    """All messages of a conversation."""
    return example["prompt"] + example["completion"] if "prompt" in example else example["messages"]


def template_options(example: dict[str, Any], chat_template: str | None) -> dict[str, Any]:
    """Keyword arguments of `apply_chat_template` for a conversation."""
    tools = example.get("tools")
    return {
        "chat_template": chat_template,
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(example.get("chat_template_kwargs") or {}),
    }


def content_finder(tokenizer: PreTrainedTokenizerBase, **template_options: Any) -> ContentFinder:
    """The finder of contents for conversations rendered with these keyword arguments of `apply_chat_template`."""
    render = partial(tokenizer.apply_chat_template, tokenize=False, **template_options)
    return ContentFinder(render, tuple(tokenizer.convert_ids_to_tokens(sorted(special_token_ids(tokenizer)))))


def require_same_tokens(rendered: RenderedExample, input_ids: list[int]) -> None:
    """Refuse a rendered row that does not have the trainer's tokens."""
    if rendered.token_ids != input_ids:
        raise InputError(
            "the tokens of the rendered text differ from those that SFTTrainer gave the row, so the assistant's text "
            "can't be found in them: pass the data set as `input_ids` and `labels`"
        )


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], first: int = 0, **template_options: Any
) -> RenderedExample:
    """
    Render a conversation with the chat template and find the assistant turns, starting with message number `first`.
    Raises an `InputError` if the content of the last assistant turn can't be found in the rendered text.
    """
    finder = content_finder(tokenizer, **template_options)
    text = finder.render(messages)
    token_ids, offsets = tokenize_with_offsets(tokenizer, text, add_special_tokens=False)
    special = special_token_ids(tokenizer)
    numbers = [i for i in range(first, len(messages)) if _speaks(messages[i])]
    contents = finder.find_contents(messages, numbers, text)
    if numbers and contents[-1] is None:
        raise InputError(
            f"The chat template omits the assistant's text {messages[numbers[-1]]['content'][:80]!r}... of message "
            f"{numbers[-1]}, or changes it depending on later turns. Use a chat template that keeps the text."
        )
    turns = []
    for i, content in zip(numbers, contents, strict=True):
        if content is not None:
            turn_end = finder.find_turn_end(messages, i, text, content[1])
            turns.append(Turn(content, _end_token(text, token_ids, offsets, special, content[1], turn_end)))
    return RenderedExample(text, token_ids, offsets, turns)


def render_text(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> RenderedExample:
    """Tokenize a plain prompt and completion. The completion is a turn that ends with the end-of-sequence token."""
    text = prompt + completion
    token_ids, offsets = tokenize_with_offsets(tokenizer, text, add_special_tokens=True)
    end = len(text.removesuffix(tokenizer.eos_token or ""))
    if end <= len(prompt):
        return RenderedExample(text, token_ids, offsets, [])
    end_token = _end_token(text, token_ids, offsets, special_token_ids(tokenizer), end, len(text))
    return RenderedExample(text, token_ids, offsets, [Turn((len(prompt), end), end_token)])


def _speaks(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and has_words(message)


def has_words(message: dict[str, Any]) -> bool:
    """Whether the content of a message is a text that is not blank."""
    content = message.get("content")
    return isinstance(content, str) and bool(content.strip())


def _end_token(
    text: str, token_ids: list[int], offsets: list[Span], special: set[int], content_end: int, turn_end: int
) -> int:
    """Index after the turn's last token. Its end may be marked by a special token, by text, or not at all."""
    following = next((i for i, (start, _) in enumerate(offsets) if start >= content_end), len(offsets))
    for i in range(following, len(offsets)):
        start, end = offsets[i]
        # If nothing separates the turns, the model must stop with the next turn's marker
        if start > max(turn_end, content_end) or (start == turn_end > content_end and end > start):
            break
        if token_ids[i] in special:
            return i + 1
        if text[start:end].strip():
            break
    last = content_end + len(text[content_end:turn_end].rstrip())
    return max((i + 1 for i, (start, _) in enumerate(offsets) if start < last), default=0)
