"""Text of tokens in visible characters."""

import re
from itertools import groupby

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..text.special_tokens import special_token_ids


_MARKS = {" ": "·", "\n": "↵", "\t": "⇥"}
_BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: set[int]) -> dict[int, str]:
    """Text of each token: the name of a special token, else [`token_text`]."""
    special = special_token_ids(tokenizer)
    return {
        token_id: tokenizer.convert_ids_to_tokens(token_id) if token_id in special else token_text(tokenizer, token_id)
        for token_id in sorted(token_ids)
    }


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    r"""Text of one token inside a longer text, with its leading space, and partial characters as bytes `\xNN`."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        return f"<no token {token_id}>"
    once, twice = (tokenizer.decode([token_id] * times, clean_up_tokenization_spaces=False) for times in (1, 2))
    # Decoders drop the leading space of a text's first token: what the second copy adds is the token's own text
    text = twice.removeprefix(once) if twice.startswith(once) else once
    if "\ufffd" in text:
        return _text_of_bytes(token)
    return text or token


def _text_of_bytes(token: str) -> str:
    byte_fallback = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)  # as in SentencePiece
    if byte_fallback:
        return rf"\x{byte_fallback[1].lower()}"
    if all(character in _BYTE_OF_CHARACTER for character in token):  # byte-level BPE
        return bytes(_BYTE_OF_CHARACTER[character] for character in token).decode("utf-8", "backslashreplace")
    return token


def visible_pieces(text: str) -> list[tuple[str, bool]]:
    """Cut a text into visible pieces, and marks that replace invisible characters: (piece, whether it is a mark)."""
    runs = groupby(text, key=_is_invisible)
    return [("".join(map(_mark, run)) if invisible else "".join(run), invisible) for invisible, run in runs]


def visible_text(text: str) -> str:
    """The text with a mark for each invisible character."""
    return "".join(piece for piece, _ in visible_pieces(text))


def _is_invisible(character: str) -> bool:
    return character == " " or not character.isprintable()


def _mark(character: str) -> str:
    return _MARKS.get(character) or character.encode("unicode_escape").decode()
