"""Finds the characters of a text that each token covers, for any tokenizer."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise, zip_longest

from transformers import PreTrainedTokenizerBase

from ..errors import InputError


# Incomplete characters decode to this
_REPLACEMENT = "\ufffd"

Span = tuple[int, int]


def tokenize_with_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool
) -> tuple[list[int], list[Span]]:
    """
    Tokenize a text and return the token ids and the span of characters that each token covers, empty for tokens that
    the tokenizer adds. Raises an `InputError` if the tokenizer neither returns offsets nor decodes its tokens back to
    the text.
    """
    if not tokenizer.is_fast:
        token_ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        decoded, offsets = TokenOffsets(tokenizer)(token_ids)
        if decoded != text:
            raise InputError(
                f"{type(tokenizer).__name__} returns no offsets, and decodes {text[:80]!r}... to {decoded[:80]!r}..., "
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
        elif start == end:  # byte-level tokenizers trim spaces from offsets, so a token of spaces looks empty
            start = min(position, start)
        offsets.append((start, end))
        position = max(position, end)
    return encoding["input_ids"], offsets


class TokenOffsets:
    """
    Decodes tokens and finds the characters that each of them covers, for tokenizers with and without offsets.

    It only decodes, so normalization and trimmed white space don't mislead it. Incomplete characters must decode to
    U+FFFD, as with the fast tokenizers of Transformers. The spans are in order and cover the text. Tokens that share a
    character (the bytes of an emoji) each span all of it; a token that adds nothing (the space that SentencePiece
    strips) has an empty span.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        # Decoders treat the first token of a text differently, so other tokens are decoded after this context
        self._context = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._context_length = len(self._decode(self._context))
        self._pieces: dict[int, str] = {}

    def __call__(self, token_ids: Sequence[int]) -> tuple[str, list[Span]]:
        """Decode tokens, special tokens included, and return the text and the span [start, end) of each token."""
        token_ids = [int(token_id) for token_id in token_ids]
        text = self._decode(token_ids)
        spans = self._spans_by_pieces(token_ids, text)
        if spans is None:  # slower, in time quadratic in the length
            prefixes = (self._decode(token_ids[:end]) for end in range(1, len(token_ids) + 1))
            spans = _spans_of_prefixes(prefixes, text)
        if spans is None or not _cover(spans, text):
            raise InputError(
                f"The tokens of {text[:80]!r}... can't be found in that text: {type(self.tokenizer).__name__} decodes "
                "the first of these tokens to something other than the start of the text. Use a tokenizer that "
                "decodes from left to right, as the fast tokenizers of Transformers do."
            )
        return text, spans

    def _spans_by_pieces(self, token_ids: list[int], text: str) -> list[Span] | None:
        """Decode the shortest runs of tokens that end with a whole character; `None` if they don't make up `text`."""
        spans, pieces = [], []
        start = position = 0
        for end in range(1, len(token_ids) + 1):
            pieces.append(self._piece(token_ids[start:end], is_first=start == 0))
            piece = pieces[-1]
            if piece.endswith(_REPLACEMENT) and end < len(token_ids):
                continue
            run = _spans_of_prefixes(pieces, piece) if len(pieces) > 1 else [(0, len(piece))]
            if run is None or not text.startswith(piece, position):
                return None
            spans += [(position + first, position + last) for first, last in run]
            position += len(piece)
            start, pieces = end, []
        return spans if position == len(text) else None

    def _piece(self, token_ids: list[int], is_first: bool) -> str:
        if is_first:
            return self._decode(token_ids)
        if len(token_ids) > 1:
            return self._decode(self._context + token_ids)[self._context_length :]
        if token_ids[0] not in self._pieces:
            self._pieces[token_ids[0]] = self._decode(self._context + token_ids)[self._context_length :]
        return self._pieces[token_ids[0]]

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _spans_of_prefixes(prefixes: Iterable[str], text: str) -> list[Span] | None:
    """
    Compute token spans from the decoded prefixes (of one token, two, ...); `None` if the text doesn't start with one.

    A token starts at the first character that is incomplete without it, and ends after the last one that it completes
    or begins. Incomplete characters appear as replacement characters at the end of a prefix.
    """
    lengths, complete, is_open = [], [], []
    for prefix in prefixes:
        common = common_length(prefix, text)
        rest = zip_longest(prefix[common:], text[common : len(prefix)], fillvalue=_REPLACEMENT)
        if not all(_REPLACEMENT in pair for pair in rest):
            return None
        lengths.append(len(prefix))
        complete.append(common)
        is_open.append(prefix.endswith(_REPLACEMENT))
    # Complete characters stay: if a later prefix lacks one, it was the replacement of an incomplete character
    shortest = list(accumulate(reversed(lengths), min))[::-1]
    spans, start = [], 0
    for length, common, limit, ends_open in zip(lengths, complete, shortest, is_open, strict=True):
        common = max(start, min(common, limit))
        end = min(common + (length > common), limit, len(text))
        is_part_of_replacement = end <= start and ends_open  # of one that remains in the text
        spans.append((max(end - 1, 0) if is_part_of_replacement else start, end))
        start = common
    return spans


def common_length(first: str, second: str) -> int:
    """Number of characters that two texts have in common at their start."""
    if second.startswith(first):
        return len(first)
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))


def _cover(spans: list[Span], text: str) -> bool:
    if not spans:
        return not text
    ordered = all(a <= c <= b <= d for (a, b), (c, d) in pairwise(spans))
    return ordered and spans[0][0] == 0 and spans[-1][1] == len(text) and all(start <= end for start, end in spans)
