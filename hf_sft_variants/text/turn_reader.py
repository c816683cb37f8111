"""Reads the assistant turns of a row, whatever form it came in."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from .assistant_turns import RenderedExample, render_example, require_same_tokens
from .decoded_turns import assistant_header, decode_example
from .key_finder import KeyFinder
from .message_tokens import find_message_tokens
from .special_tokens import special_token_ids
from .token_offsets import TokenOffsets


class TurnReader:
    """
    Reads the documents of rows, of which packed ones have several. Rows with text or messages (`has_text`) are
    rendered; the tokens of all others are decoded, and may then be marked by what `find_key` looks for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        text_field: str,
        has_text: bool,
        find_key: KeyFinder,
    ):
        self.render_arguments = (tokenizer, chat_template, text_field)
        self.has_text = has_text
        if not has_text:
            self.every_turn = find_key.key_turns == "all"
            self.header = assistant_header(tokenizer, chat_template)
            self.token_offsets = TokenOffsets(tokenizer)
            # A token that shows where the key is does not end a turn, even if it is special
            special = special_token_ids(tokenizer)
            self.special = {i for i in special if not find_key.looks_for(tokenizer.convert_ids_to_tokens(i))}

    def __call__(self, example: dict[str, Any]) -> list[RenderedExample]:
        if self.has_text:
            rendered = render_example(example, *self.render_arguments)
            require_same_tokens(rendered, example["input_ids"])
            return [rendered]
        documents, start = [], 0
        for length in example.get("seq_lengths") or [len(example["input_ids"])]:
            ids, labels = (example[column][start : start + length] for column in ("input_ids", "labels"))
            arguments = (self.token_offsets, self.special, self.header, ids, labels, self.every_turn)
            documents.append(decode_example(*arguments))
            start += length
        return documents

    def message_tokens(self, example: dict[str, Any]) -> list[list[int] | None]:
        """The tokens of each message of a row with messages, as [`find_message_tokens`] finds them."""
        (rendered,) = self(example)
        tokenizer, chat_template, _ = self.render_arguments
        return find_message_tokens(example, rendered, tokenizer, chat_template)
