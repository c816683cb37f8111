"""Where the assistant's words stand in an example's text and among its tokens, for any template and tokenizer."""

import json
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from ..errors import InputError
from .token_offsets import Span, TokenOffsets
from .turn_contents import common_length, find_contents, find_turn_end


_UNKNOWN_TURNS = (
    "the assistant's turns can't be told from the others, because every token has a label and {}: give messages, or "
    "labels that are -100 on all tokens but the assistant's, or set `key_turns='last'`"
)


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


def assistant_start(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> re.Pattern | None:
    """
    What a chat template writes before the assistant's words, as a pattern for the text that tokens decode to.

    It is the generation prompt, as far as a finished turn begins with it too; of a template without one, what is
    between a question and its answer. White space is optional, because not every tokenizer keeps it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        chat_template (`str`, *optional*):
            Chat template, by default the tokenizer's.

    Returns:
        `re.Pattern`, or `None` if there is no template or it puts nothing before an answer.
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
    signs = r"\s*".join(map(re.escape, "".join(header.split())))
    return re.compile(f"{signs}(?:{re.escape(header[len(header.rstrip()) :])})?")


def render_tokens(
    token_offsets: TokenOffsets,
    special: set[int],
    assistant_start: re.Pattern | None,
    token_ids: list[int],
    labels: list[int],
    every_turn: bool,
) -> RenderedExample:
    """
    Read tokens back, where there are no messages: the assistant's words are runs of tokens that have a label, behind
    what the chat template writes before them, up to a special token.

    Where no turn begins as the template has it, the roles can't be told, and every run is taken for a turn.

    Args:
        token_offsets ([`~hf_sft_variants.text.token_offsets.TokenOffsets`]):
            Of the tokenizer that made the tokens.
        special (`set[int]`):
            Ids of its special tokens ([`special_token_ids`]).
        assistant_start (`re.Pattern`, *optional*):
            What precedes the assistant's words ([`assistant_start`]).
        token_ids (`list[int]`):
            Tokens of an example.
        labels (`list[int]`):
            `-100` on the tokens that are not in the loss.
        every_turn (`bool`):
            Whether all turns are wanted, or the last one alone, which can be told where others can't.

    Raises:
        `InputError`: If `every_turn` and the assistant's turns can't be told from the others.
    """
    text, offsets = token_offsets(token_ids)
    starts = [match.end() for match in assistant_start.finditer(text)] if assistant_start else []
    turns, start, after_special = [], 0, 0
    for position in range(len(token_ids) + 1):
        at_end = position == len(token_ids) or labels[position] == -100
        is_special = position < len(token_ids) and token_ids[position] in special
        if not at_end and not is_special:
            continue
        first, last = (offsets[start][0], offsets[position - 1][1]) if position > start else (0, 0)
        own_starts = [begin for begin in starts if after_special <= begin < last]
        if every_turn and sum(begin > first for begin in own_starts) > 1:
            raise InputError(_UNKNOWN_TURNS.format("no special token ends them"))
        if own_starts:
            first = max(first, own_starts[-1])
        if text[first:last].strip() and (own_starts or not starts):
            turns.append(Turn((first, last), position if at_end else position + 1))
        start = position + 1
        after_special = offsets[position][1] if is_special else after_special
    if every_turn and not starts and len(turns) > 1 and -100 not in labels:
        raise InputError(_UNKNOWN_TURNS.format("none begins as the chat template has it"))
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
