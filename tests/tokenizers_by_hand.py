"""The tokenizers on the spot with vocabularies written by hand, so that the tokens of a text can be, too."""

from templates_on_the_spot import SPECIAL_TOKENS
from tokenizers import models, pre_tokenizers
from tokenizers_on_the_spot import byte_fallback, byte_level, unigram, word_level, word_piece
from transformers import PreTrainedTokenizerFast


TAGS = ["<Thinking>", "</Thinking>", "<Answer>", "</Answer>"]
WORDS = ["assistant", "plus", "sum", "Add", "the", "tens", "What", "is", "user"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
SIGNS = list("<>/+=.,:?!-|_*(){}[]#%\\$")


def bpe(base: list[str], pieces: list[str], **options) -> models.BPE:
    """BPE that knows `base` and builds each piece from the left, the first piece first."""
    merges = list(dict.fromkeys((piece[:end], piece[end]) for piece in pieces for end in range(1, len(piece))))
    tokens = dict.fromkeys([*base, *map("".join, merges)])
    return models.BPE({token: number for number, token in enumerate(tokens)}, merges, **options)


def with_model(tokenizer: PreTrainedTokenizerFast, model: models.Model) -> PreTrainedTokenizerFast:
    """The tokenizer's own steps before and after another vocabulary, which has the same special tokens first."""
    tokenizer.backend_tokenizer.model = model
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    return tokenizer


def split_tags() -> PreTrainedTokenizerFast:
    """Byte-level BPE, a tag is several tokens: `</ Think ing >`."""
    pieces = ["Think", "ing", "An", "sw", "er", "42", *("Ġ" + word for word in WORDS), *WORDS]
    return with_model(byte_level(), bpe(["<|end|>", "<|user|>", *BYTES], ["</", *pieces]))


def merged_tags() -> PreTrainedTokenizerFast:
    """Byte-level BPE over whole texts: a `>` merges with what follows it."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = ["Thinking", "Answer", "></", "><", ">Ċ<", ">čĊ<", ">ĊĊ", ">Ġ", "</", "42", *WORDS]
    return with_model(tokenizer, bpe(["<|end|>", "<|user|>", *BYTES], pieces))


def whole_tags() -> PreTrainedTokenizerFast:
    """Byte-level BPE with each tag a special token of its own."""
    tokenizer = split_tags()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS + TAGS})
    return tokenizer


def sentence_piece() -> PreTrainedTokenizerFast:
    """BPE that writes spaces as `▁`, and in bytes what it does not know: line breaks, emoji."""
    base = ["<unk>", "<s>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, *SIGNS]
    pieces = ["Thinking", "Answer", "></", "</", "▁<", "42", *("▁" + word for word in WORDS), *WORDS]
    return with_model(byte_fallback(), bpe(base, pieces, byte_fallback=True, unk_token="<unk>", fuse_unk=True))


def sentence_unigram() -> PreTrainedTokenizerFast:
    """Unigram of the words between white space, each behind a `▁`; unknown characters are `<unk>`."""
    pieces = ["▁<", "</", "><", "Thinking", "Answer", "42", *WORDS, *("▁" + word for word in WORDS)]
    scores = {
        **dict.fromkeys(["<s>", "<pad>", "<|end|>", "<unk>"], 0.0),
        **dict.fromkeys(["▁", *LETTERS, *SIGNS], -9.0),
    }
    scores.update((piece, -4.0) for piece in pieces)
    return with_model(unigram(), models.Unigram(list(scores.items()), unk_id=3))


def bert_pieces() -> PreTrainedTokenizerFast:
    """WordPiece: no white space, each sign a token, `##` inside a word."""
    pieces = ["Think", "##ing", "An", "##swer", "42", *WORDS, *SIGNS, *LETTERS, *("##" + letter for letter in LETTERS)]
    tokens = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces])
    return with_model(word_piece(), models.WordPiece({t: n for n, t in enumerate(tokens)}, unk_token="[UNK]"))


def whole_words() -> PreTrainedTokenizerFast:
    """WordLevel: no white space, a word or a run of signs is a token, so that `><` is one."""
    tokens = dict.fromkeys(["[UNK]", "<", "</", ">", "><", "Thinking", "Answer", "42", ".", ":", "?", *WORDS])
    return with_model(word_level(), models.WordLevel({t: n for n, t in enumerate(tokens)}, unk_token="[UNK]"))


BY_HAND = {
    function.__name__: function
    for function in (
        split_tags, merged_tags, whole_tags, sentence_piece, sentence_unigram, bert_pieces, whole_words
    )
}  # fmt: skip
