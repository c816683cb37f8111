"""Where the assistant's turns are in an example that is rendered as text: its words, and what ends a turn."""

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
    """A turn of the assistant: characters of its own words, and number of the first token after its end of turn."""

    content: Span
    end_token: int


@dataclass(frozen=True)
class RenderedExample:
    """
    An example as the model reads it.

    Attributes:
        text (`str`):
            The text, including what the chat template adds.
        token_ids (`list[int]`):
            Its tokens.
        offsets (`list[tuple[int, int]]`):
            Characters [start, end) that each token covers; an empty span for a token that covers none.
        turns (`list[Turn]`):
            The assistant's turns that have words, in order.
    """

    text: str
    token_ids: list[int]
    offsets: list[Span]
    turns: list[Turn]

    def tokens_in(self, span: Span) -> list[int]:
        """Numbers of the tokens that cover any of the characters [start, end)."""
        return [i for i, (start, end) in enumerate(self.offsets) if start < span[1] and end > span[0]]


def render_example(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: str | None, text_field: str
) -> RenderedExample:
    """
    Render and tokenize a row as `SFTTrainer` does, and find the assistant's turns.

    The row has `messages`, `prompt` and `completion`, or a text in `text_field`; texts end with the end of sequence
    that [`~trl.SFTTrainer`] has added. The chat template is by default the tokenizer's.

    Raises:
        `InputError`: If the assistant's words can't be found in the rendered text.
    """
    if is_conversational(example):
        tools = example.get("tools")
        options = {
            "chat_template": chat_template,
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(example.get("chat_template_kwargs") or {}),
        }
        if "prompt" not in example:
            return render_conversation(tokenizer, example["messages"], **options)
        messages = example["prompt"] + example["completion"]
        return render_conversation(tokenizer, messages, len(example["prompt"]), **options)
    if "prompt" in example:
        return render_text(tokenizer, example["prompt"], example["completion"])
    return render_text(tokenizer, "", example[text_field])


def require_same_tokens(rendered: RenderedExample, input_ids: list[int]) -> None:
    """
    Raises:
        `InputError`: If the tokens of the rendered row are not the trainer's.
    """
    if rendered.token_ids != input_ids:
        raise InputError(
            "the tokens of the text are not those that SFTTrainer made of it, so the assistant's words can't be found "
            "among them: give the data set as `input_ids` and `labels`"
        )


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], first: int = 0, **template_options: Any
) -> RenderedExample:
    """
    Render a conversation with the chat template and find the assistant's turns from message number `first` on.

    Raises:
        `InputError`: If the words of its last turn can't be found in the rendered text.
    """
    render = partial(tokenizer.apply_chat_template, tokenize=False, **template_options)
    text = render(messages)
    token_ids, offsets = tokenize_with_offsets(tokenizer, text, add_special_tokens=False)
    special = special_token_ids(tokenizer)
    finder = ContentFinder(render, tuple(tokenizer.convert_ids_to_tokens(sorted(special))))
    numbers = [i for i in range(first, len(messages)) if _has_words(messages[i])]
    contents = finder.find_contents(messages, numbers, text)
    if numbers and contents[-1] is None:
        raise InputError(
            f"The chat template doesn't show the assistant's words {messages[numbers[-1]]['content'][:80]!r}... of "
            f"message {numbers[-1]}, or rewrites them with the turns that follow. Use a chat template that keeps them."
        )
    turns = []
    for i, content in zip(numbers, contents, strict=True):
        if content is not None:
            turn_end = finder.find_turn_end(messages, i, text, content[1])
            turns.append(Turn(content, _end_token(text, token_ids, offsets, special, content[1], turn_end)))
    return RenderedExample(text, token_ids, offsets, turns)


def render_text(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> RenderedExample:
    """Tokenize a plain prompt and completion. The completion is a turn, ended by the end of sequence."""
    text = prompt + completion
    token_ids, offsets = tokenize_with_offsets(tokenizer, text, add_special_tokens=True)
    end = len(text.removesuffix(tokenizer.eos_token or ""))
    if end <= len(prompt):
        return RenderedExample(text, token_ids, offsets, [])
    end_token = _end_token(text, token_ids, offsets, special_token_ids(tokenizer), end, len(text))
    return RenderedExample(text, token_ids, offsets, [Turn((len(prompt), end), end_token)])


def _has_words(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return message["role"] == "assistant" and isinstance(content, str) and bool(content.strip())


def _end_token(
    text: str, token_ids: list[int], offsets: list[Span], special: set[int], content_end: int, turn_end: int
) -> int:
    """The words are followed by a special token that ends the turn, or by text that does, or by nothing."""
    following = next((i for i, (start, _) in enumerate(offsets) if start >= content_end), len(offsets))
    for i in range(following, len(offsets)):
        start, end = offsets[i]
        # With no text in between, the model has to stop with the marker of the next turn
        if start > max(turn_end, content_end) or (start == turn_end > content_end and end > start):
            break
        if token_ids[i] in special:
            return i + 1
        if text[start:end].strip():
            break
    last = content_end + len(text[content_end:turn_end].rstrip())
    return max((i + 1 for i, (start, _) in enumerate(offsets) if start < last), default=0)
