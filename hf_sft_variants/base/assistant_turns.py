"""Where the assistant's words stand in an example's text and among its tokens, for any template and tokenizer."""

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from ..errors import InputError
from .token_offsets import Span, TokenOffsets
from .turn_contents import find_contents, find_turn_end


@dataclass(frozen=True)
class Turn:
    """
    One of the assistant's turns.

    Attributes:
        content (`tuple[int, int]`):
            Characters [start, end) of the assistant's own words.
        end_token (`int`):
            Number of the first token after the turn: its end-of-turn token, where there is one, is the one before.
    """

    content: Span
    end_token: int


@dataclass(frozen=True)
class RenderedExample:
    """
    An example as the model reads it.

    Attributes:
        text (`str`):
            The text, with what the chat template adds.
        token_ids (`list[int]`):
            Its tokens.
        offsets (`list[tuple[int, int]]`):
            Characters [start, end) that each token stands for; empty for a token that stands for none.
        turns (`list[Turn]`):
            The assistant's turns that have words, in order.
    """

    text: str
    token_ids: list[int]
    offsets: list[Span]
    turns: list[Turn]

    def tokens_in(self, span: Span) -> list[int]:
        """Numbers of the tokens that stand for any of the characters [start, end)."""
        return [i for i, (start, end) in enumerate(self.offsets) if start < span[1] and end > span[0]]


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all tokens the tokenizer calls special: eos, end of turn, role markers, those added later included."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - {None}


def render_example(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: str | None, text_field: str
) -> RenderedExample:
    """
    Render and tokenize a row as `SFTTrainer` does: `prompt` and `completion`, or `messages`, or a text.

    Args:
        example (`dict[str, Any]`):
            Row with the columns that [`~trl.SFTTrainer`] reads, after it has added the end of sequence to texts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        chat_template (`str`, *optional*):
            Chat template, by default the tokenizer's.
        text_field (`str`):
            Column of a plain text.

    Raises:
        `InputError`: If an assistant's words can't be found in what the template makes of them.
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
        `InputError`: If the tokens of a rendered row are not those that the trainer has.
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
    Render a conversation with the chat template and find the assistant's words in it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a chat template.
        messages (`list[dict[str, Any]]`):
            The conversation.
        first (`int`, *optional*, defaults to `0`):
            Number of the first message whose turn is wanted.
        **template_options:
            For `apply_chat_template`, such as `chat_template` and `tools`.

    Raises:
        `InputError`: If an assistant's words can't be found in what the template makes of them.
    """
    render = partial(tokenizer.apply_chat_template, tokenize=False, **template_options)
    text = render(messages)
    spoken = [i for i in range(first, len(messages)) if _has_words(messages[i])]
    token_ids, offsets = tokenize_with_offsets(tokenizer, text, add_special_tokens=False)
    special = special_token_ids(tokenizer)
    special_texts = tuple(tokenizer.convert_ids_to_tokens(sorted(special)))
    contents = find_contents(render, messages, spoken, text, special_texts)
    if spoken and contents[-1] is None:
        raise InputError(
            f"The chat template doesn't show the assistant's words {messages[spoken[-1]]['content'][:80]!r}... of "
            f"message {spoken[-1]}, or rewrites them with the turns that follow. Use a chat template that keeps them."
        )
    turns = []
    for i, content in zip(spoken, contents, strict=True):
        if content is not None:
            turn_end = find_turn_end(render, messages, i, text, content[1], special_texts)
            turns.append(Turn(content, _end_token(text, token_ids, offsets, special, content[1], turn_end)))
    return RenderedExample(text, token_ids, offsets, turns)


def render_text(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> RenderedExample:
    """Tokenize a plain prompt and completion; the completion is one turn, which the end of sequence ends."""
    text = prompt + completion
    token_ids, offsets = tokenize_with_offsets(tokenizer, text, add_special_tokens=True)
    end = len(text.removesuffix(tokenizer.eos_token or ""))
    if end <= len(prompt):
        return RenderedExample(text, token_ids, offsets, [])
    content = (len(prompt), end)
    end_token = _end_token(text, token_ids, offsets, special_token_ids(tokenizer), end, len(text))
    return RenderedExample(text, token_ids, offsets, [Turn(content, end_token)])


def render_tokens(
    token_offsets: TokenOffsets, special: set[int], token_ids: list[int], labels: list[int]
) -> RenderedExample:
    """
    Read tokens back, where there are no messages: the assistant's words are runs of tokens that have a label.

    A special token ends a turn, so that a conversation with a label on every token falls apart into its messages.

    Args:
        token_offsets ([`~hf_sft_variants.base.token_offsets.TokenOffsets`]):
            Of the tokenizer that made the tokens.
        special (`set[int]`):
            Ids of its special tokens ([`special_token_ids`]).
        token_ids (`list[int]`):
            Tokens of an example.
        labels (`list[int]`):
            `-100` on the tokens that are not in the loss.
    """
    text, offsets = token_offsets(token_ids)
    turns, start = [], 0
    for position in range(len(token_ids) + 1):
        at_end = position == len(token_ids) or labels[position] == -100
        if not at_end and token_ids[position] not in special:
            continue
        content = (offsets[start][0], offsets[position - 1][1]) if position > start else (0, 0)
        if text[slice(*content)].strip():
            turns.append(Turn(content, position if at_end else position + 1))
        start = position + 1
    return RenderedExample(text, token_ids, offsets, turns)


def tokenize_with_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool
) -> tuple[list[int], list[Span]]:
    """
    Tokenize a text and tell which of its characters each token stands for; a token that the tokenizer adds to the text
    stands for none.

    Raises:
        `InputError`: If the tokenizer has no offsets and does not decode its tokens to the text either.
    """
    if not tokenizer.is_fast:
        token_ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        decoded, offsets = TokenOffsets(tokenizer)(token_ids)
        if decoded != text:
            raise InputError(
                f"{type(tokenizer).__name__} gives no offsets, and decodes {text[:80]!r}... to {decoded[:80]!r}..., "
                "so the tokens of an answer can't be found. Use a fast tokenizer."
            )
        return token_ids, offsets
    encoding = tokenizer(
        text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, return_special_tokens_mask=True
    )
    offsets, position = [], 0
    for (start, end), is_added in zip(encoding["offset_mapping"], encoding["special_tokens_mask"], strict=True):
        if is_added:
            start = end = position
        elif start == end:  # byte-level tokenizers leave out spaces, so a token of spaces seems empty
            start = min(position, start)
        offsets.append((start, end))
        position = max(position, end)
    return encoding["input_ids"], offsets


def _has_words(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return message["role"] == "assistant" and isinstance(content, str) and bool(content.strip())


def _end_token(
    text: str, token_ids: list[int], offsets: list[Span], special: set[int], content_end: int, turn_end: int
) -> int:
    """After the words comes a special token that ends the turn, or text that does, or nothing."""
    following = next((i for i, (start, _) in enumerate(offsets) if start >= content_end), len(offsets))
    for i in range(following, len(offsets)):
        start, end = offsets[i]
        # With no text in between, the marker of the next turn is what the model has to stop with
        if start > max(turn_end, content_end) or (start == turn_end > content_end and end > start):
            break
        if token_ids[i] in special:
            return i + 1
        if text[start:end].strip():
            break
    end_text = text[content_end:turn_end].rstrip()
    last = content_end + len(end_text)
    return max((i + 1 for i, (start, _) in enumerate(offsets) if start < last), default=0)
