"""Where each token stands in the text that the tokens decode to, for any tokenizer."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise, zip_longest

from transformers import PreTrainedTokenizerBase

from ..errors import InputError


# Stands for bytes that are no whole character, or not yet
_REPLACEMENT = "\ufffd"

Span = tuple[int, int]


def token_offsets(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> tuple[str, list[Span]]:
    """
    Decode tokens and tell which characters each of them stands for. For many texts keep a [`TokenOffsets`].

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Any tokenizer that decodes the start of a text to the start of its decoding.
        token_ids (`Sequence[int]`):
            Tokens of one text, special tokens included.

    Returns:
        `tuple[str, list[tuple[int, int]]]`: The text, and for each token its span [start, end) in it.

    Raises:
        `InputError`: If the tokenizer decodes in a way that tokens can't be found in the text.
    """
    return TokenOffsets(tokenizer)(token_ids)


class TokenOffsets:
    """
    Finds the characters each token stands for by decoding alone, so no offsets are asked of the tokenizer and no
    normalization or trimming of white space gets in between. An incomplete character has to decode to U+FFFD, as it
    does in the fast tokenizers of Transformers.

    Spans follow each other and cover the text. Tokens that share a character (a byte-level tokenizer's parts of an
    emoji) each span all of it; a token that adds nothing (the space that SentencePiece strips) has an empty span.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that made the tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        # Decoders treat the first token of a text in its own way, so other tokens are decoded after this one
        self._context = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._context_length = len(self._decode(self._context))
        self._pieces: dict[int, str] = {}

    def __call__(self, token_ids: Sequence[int]) -> tuple[str, list[Span]]:
        """As [`token_offsets`]."""
        token_ids = [int(token_id) for token_id in token_ids]
        text = self._decode(token_ids)
        spans = self._spans_by_pieces(token_ids, text)
        if spans is None:  # exact as well, but its time grows with the square of the length
            prefixes = (self._decode(token_ids[:end]) for end in range(1, len(token_ids) + 1))
            spans = spans_of_prefixes(prefixes, text)
        if spans is None or not _cover(spans, text):
            raise InputError(
                f"The tokens of {text[:80]!r}... can't be found in that text: {type(self.tokenizer).__name__} decodes "
                "the start of these tokens to something else than the start of the text. Use a tokenizer that decodes "
                "from left to right, as the fast tokenizers of Transformers do."
            )
        return text, spans

    def _spans_by_pieces(self, token_ids: list[int], text: str) -> list[Span] | None:
        """Decode runs of tokens as short as whole characters allow; `None` if they don't make up the text."""
        spans, pieces = [], []
        start = position = 0
        for end in range(1, len(token_ids) + 1):
            pieces.append(self._piece(token_ids[start:end], is_first=start == 0))
            piece = pieces[-1]
            if piece.endswith(_REPLACEMENT) and end < len(token_ids):
                continue
            run = spans_of_prefixes(pieces, piece) if len(pieces) > 1 else [(0, len(piece))]
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


def spans_of_prefixes(prefixes: Iterable[str], text: str) -> list[Span] | None:
    """
    Spans of tokens from what the first one, two, ... of them decode to.

    A token starts at the first character that was not complete before it, and ends at the last that it completes or
    begins. Characters that are not complete yet show as replacement characters at the end of a prefix.

    Returns:
        `list[tuple[int, int]]`, or `None` if a prefix is no start of the text.
    """
    lengths, complete, is_open = [], [], []
    for prefix in prefixes:
        common = _common_length(prefix, text)
        rest = zip_longest(prefix[common:], text[common : len(prefix)], fillvalue=_REPLACEMENT)
        if not all(_REPLACEMENT in pair for pair in rest):
            return None
        lengths.append(len(prefix))
        complete.append(common)
        is_open.append(prefix.endswith(_REPLACEMENT))
    # A character that is there stays there: what a later prefix lacks was the replacement of an incomplete one
    shortest = list(accumulate(reversed(lengths), min))[::-1]
    spans, start = [], 0
    for length, common, limit, ends_open in zip(lengths, complete, shortest, is_open, strict=True):
        common = max(start, min(common, limit))
        end = min(common + (length > common), limit, len(text))
        is_part_of_replacement = end <= start and ends_open  # of one that stays in the text
        spans.append((max(end - 1, 0) if is_part_of_replacement else start, end))
        start = common
    return spans


def _common_length(prefix: str, text: str) -> int:
    if text.startswith(prefix):
        return len(prefix)
    return next(i for i, (a, b) in enumerate(zip_longest(prefix, text)) if a != b)


def _cover(spans: list[Span], text: str) -> bool:
    if not spans:
        return not text
    ordered = all(a <= c <= b <= d for (a, b), (c, d) in pairwise(spans))
    return ordered and spans[0][0] == 0 and spans[-1][1] == len(text) and all(start <= end for start, end in spans)
