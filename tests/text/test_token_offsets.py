import pytest
from fixtures.small_tokenizers import KINDS, byte_fallback, byte_level, characters_of_tokens, word_end_bpe, word_piece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from hf_sft_variants.text.token_offsets import TokenOffsets


TOKENIZERS = {kind: build() for kind, (build, _) in KINDS.items()}
OFFSETS = {kind: TokenOffsets(tokenizer) for kind, tokenizer in TOKENIZERS.items()}

TEXTS = [
    "What is 12 plus 30?  Unhappiness!",
    "  leading and trailing spaces  ",
    "emoji 😀👍🏽 in👩‍👩‍👧a row 🤷",
    "日本語の文章 中文，句子。한국어",
    "combining: e\u0301 n\u0303 a\u0300\u0301z; nai\u0308ve naïve",
    "tabs\tand\n\nnewlines\r\n \t mixed",
    "I don't do not know , do you ? ' s'",
    "¿Qué? Привет, мир — “quotes” … ½ ﬁ",
    "x",
    " ",
    "",
]

# Letters that the tokenizers know, others, white space, combining marks and characters of two to four bytes
characters = st.sampled_from(list("abeintu THE.,'! \n\téïñ日本中한語😀👍🏽👩\u200d\u0301\u0303½ﬁЖ\u00a0\u3000"))
texts = st.text(characters, max_size=30) | st.text(st.characters(exclude_categories=("Cs",)), max_size=10)


def check_spans(text: str, spans: list[tuple[int, int]]) -> None:
    """Spans follow each other and leave nothing out."""
    covered = 0
    for number, (start, end) in enumerate(spans):
        assert 0 <= start <= end <= len(text)
        assert start <= covered
        if number:
            assert start >= spans[number - 1][0]
            assert end >= spans[number - 1][1]
        covered = max(covered, end)
    assert covered == len(text)


@pytest.mark.parametrize("kind", KINDS)
class TestAgainstByteMap:
    def check(self, kind, text):
        tokenizer = TOKENIZERS[kind]
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        decoded, spans = OFFSETS[kind](token_ids)
        expected_text, expected = characters_of_tokens(kind, tokenizer, token_ids)
        assert decoded == expected_text
        assert [list(range(start, end)) for start, end in spans] == expected
        check_spans(decoded, spans)

    @pytest.mark.parametrize("text", TEXTS)
    def test_text(self, kind, text):
        self.check(kind, text)

    # The replacement character itself is tested below: its bytes look like incomplete characters
    @given(text=texts.map(lambda text: text.replace("\ufffd", "")))
    @settings(max_examples=100, deadline=None, derandomize=True)
    def test_random_texts(self, kind, text):
        self.check(kind, text)


class TestProperties:
    @given(text=texts, kind=st.sampled_from(sorted(set(KINDS) & {"byte_level", "byte_fallback"})))
    @settings(max_examples=200, deadline=None, derandomize=True)
    def test_text_comes_back(self, text, kind):
        token_ids = TOKENIZERS[kind].encode(text, add_special_tokens=False)
        decoded, spans = OFFSETS[kind](token_ids)
        assert decoded == text or (kind == "byte_fallback" and decoded in (text.removeprefix(" "), text))
        assert len(spans) == len(token_ids)
        check_spans(decoded, spans)

    @pytest.mark.parametrize("kind", KINDS)
    @given(data=st.data())
    @settings(max_examples=100, deadline=None, derandomize=True)
    def test_any_tokens(self, kind, data):
        """Tokens in an order that no text has, bytes that are no character among them."""
        tokenizer = TOKENIZERS[kind]
        token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=15))
        text, spans = OFFSETS[kind](token_ids)
        assert text == tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        assert len(spans) == len(token_ids)
        check_spans(text, spans)


class TestCases:
    def spans_of(self, tokenizer, text):
        decoded, spans = TokenOffsets(tokenizer)(tokenizer.encode(text, add_special_tokens=False))
        return [decoded[start:end] for start, end in spans]

    def test_tokens_within_a_character_span_all_of_it(self):
        assert self.spans_of(byte_level(), "a🤷b") == ["a", "🤷", "🤷", "🤷", "b"]

    def test_special_tokens_in_the_middle(self):
        pieces = self.spans_of(byte_level(), "<|user|>\n日<|end|> x<|end|>")
        assert [piece for piece in pieces if piece.startswith("<|")] == ["<|user|>", "<|end|>", "<|end|>"]
        assert "".join(dict.fromkeys(pieces)) == "<|user|>\n日<|end|> x"

    def test_literal_replacement_character(self):
        pieces = self.spans_of(byte_level(), "a\ufffdb\ufffd\ufffdc")
        assert set(pieces) == {"a", "\ufffd", "b", "c"}

    @pytest.mark.parametrize("build", [byte_level, byte_fallback])
    def test_cut_inside_a_character(self, build):
        """Truncation may leave the first bytes of an emoji, after a new line that is a byte token itself."""
        tokenizer = build()
        token_ids = tokenizer.encode("yes\n🤷", add_special_tokens=False)[:-1]
        text, spans = TokenOffsets(tokenizer)(token_ids)
        assert text.startswith("yes")
        check_spans(text, spans)
        assert text[slice(*spans[-1])].strip("\ufffd") == ""

    def test_space_that_decoding_strips_is_empty(self):
        tokenizer = byte_fallback()
        assert self.spans_of(tokenizer, "Yes")[:2] == ["", "Y"]

    def test_clean_up_is_not_asked_for(self):
        tokenizer = TOKENIZERS["word_level"]
        tokenizer.clean_up_tokenization_spaces = True
        assert self.spans_of(tokenizer, "the sum .")[-1] == " ."

    @given(text=texts)
    @settings(max_examples=50, deadline=None, derandomize=True)
    def test_decoding_that_depends_on_what_follows(self, text):
        tokenizer = word_end_bpe()
        decoded, spans = TokenOffsets(tokenizer)(tokenizer.encode(text))
        check_spans(decoded, spans)

    def test_slow_tokenizer(self):
        tokenizer = ByT5Tokenizer()
        assert not tokenizer.is_fast
        assert self.spans_of(tokenizer, "a b\n") == ["a", " ", "b", "\n"]

    def test_numpy_ids_and_no_ids(self):
        tokenizer = word_piece()
        token_ids = tokenizer("unhappy", add_special_tokens=False, return_tensors="np")["input_ids"][0]
        assert TokenOffsets(tokenizer)(token_ids)[0] == "unhappy"
        assert TokenOffsets(tokenizer)([]) == ("", [])

    def test_tokenizer_that_decodes_from_the_right_is_refused(self):
        class RightToLeft:
            def encode(self, text, add_special_tokens):
                return [ord(character) for character in text]

            def decode(self, token_ids, **kwargs):
                return "".join(map(chr, reversed(token_ids)))

        with pytest.raises(ValueError, match="can't be found in that text: RightToLeft decodes"):
            TokenOffsets(RightToLeft())([ord("a"), ord("b")])
