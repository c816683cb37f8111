"""Small tokenizers of every kind, built on the spot, and a slow map from their tokens to characters."""

import json
import re

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


CORPUS = [
    "What is 12 plus 30? Add the tens, then the ones: the sum is 42.",
    "The unlucky are unhappy; unhappiness is unbelievable! (Yes, really.)",
    "a naïve café, e\u0301te\u0301, I don't know - do you?",
    "日本語の文章と中文句子。 한국어 문장 😀 👍🏽 👩‍👩‍👧",
    "line\n\ttab  two  spaces",
]


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's and Qwen's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special_tokens = ["<|end|>", "<|user|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", additional_special_tokens=["<|user|>"]
    )


def byte_fallback() -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE with bytes for unknown characters, as Llama 2's and Mistral's."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special_tokens = ["<unk>", "<s>", "<|end|>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special_tokens + byte_tokens, show_progress=False)
    backend.train_from_iterator(CORPUS[:3], trainer)
    # The bytes are ordinary tokens
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][: len(special_tokens)]
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|end|>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece-like Unigram without bytes, which normalizes and drops white space, as XLM-RoBERTa's."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    special_tokens = ["<s>", "<pad>", "<|end|>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=special_tokens, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        "<s> $A <|end|>", special_tokens=[("<s>", 0), ("<|end|>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="<|end|>", unk_token="<unk>"
    )


def word_piece(lowercase: bool = False) -> PreTrainedTokenizerFast:
    """WordPiece, as BERT's; with `lowercase` it strips accents too."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special_tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=220, special_tokens=special_tokens, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def word_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def word_end_bpe() -> PreTrainedTokenizerFast:
    """BPE that marks the end of a word, as CLIP's: what a token decodes to depends on what follows it."""
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=220, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes printable bytes as themselves and numbers the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + n): byte for n, byte in enumerate(others)}}


_BYTES = _byte_of_character()


def _byte_level_bytes(token: str, position: int) -> bytes:
    return bytes(_BYTES[character] for character in token)


def _byte_fallback_bytes(token: str, position: int) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    text = token.replace("▁", " ")
    return (text.removeprefix(" ") if position == 0 else text).encode()


def _unigram_bytes(token: str, position: int) -> bytes:
    text = token.replace("▁", " ")
    return (text.removeprefix(" ") if position == 0 else text).encode()


def _word_piece_bytes(token: str, position: int) -> bytes:
    joined = position == 0 or token.startswith("##") or token in {".", ",", "?", "!"}
    return (token.removeprefix("##") if joined and position else token if joined else " " + token).encode()


def _word_level_bytes(token: str, position: int) -> bytes:
    return (token if position == 0 else " " + token).encode()


# How each kind of token is written in bytes, beside the tokenizer
KINDS = {
    "byte_level": (byte_level, _byte_level_bytes),
    "byte_fallback": (byte_fallback, _byte_fallback_bytes),
    "unigram": (unigram, _unigram_bytes),
    "word_piece": (word_piece, _word_piece_bytes),
    "lowercase_word_piece": (lambda: word_piece(lowercase=True), _word_piece_bytes),
    "word_level": (word_level, _word_level_bytes),
}


def characters_of_tokens(kind: str, tokenizer, token_ids: list[int]) -> tuple[str, list[list[int]]]:
    """The text of tokens and the numbers of the characters that each stands for, byte by byte."""
    written = [KINDS[kind][1](tokenizer.convert_ids_to_tokens(i), n) for n, i in enumerate(token_ids)]
    text = b"".join(written).decode()
    character_of_byte = [number for number, character in enumerate(text) for _ in character.encode()]
    characters, position = [], 0
    for token_bytes in written:
        characters.append(sorted(set(character_of_byte[position : position + len(token_bytes)])))
        position += len(token_bytes)
    return text, characters
