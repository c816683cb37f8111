"""Which tokens are the key, against masks written by hand and a slow map from tokens to characters."""

import re
from pathlib import Path

import pytest
import trl
from fixtures import chat_templates as templates
from fixtures.chat_templates import CHATML, LLAMA_3, NO_END, QWEN_3, TOOLS, UPPER_CASE
from fixtures.handmade_tokenizers import (
    BY_HAND,
    TAGS,
    merged_tags,
    sentence_piece,
    sentence_unigram,
    split_tags,
    whole_tags,
)
from fixtures.small_tokenizers import characters_of_tokens
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_sft_variants.errors import InputError
from hf_sft_variants.sftkey.key_mask import add_key_mask, has_whole_key
from hf_sft_variants.text.key_finder import KeyFinder, NoKeyError


BOXED = r"\\boxed\{(?P<key>(?:[^{}]|(?P<braces>\{(?:[^{}]|(?&braces))*\}))*)\}"
SENTENCE = r"The answer is (?P<key>.+?)\."


def finder(**options):
    """A KeyFinder with the configuration's defaults."""
    defaults = {
        "thinking_tags": ("<Thinking>", "</Thinking>"),
        "answer_tags": ("<Answer>", "</Answer>"),
        "key_delimiter": None,
        "key_pattern": None,
        "key_tags_in_loss": True,
        "key_turns": "last",
    }
    return KeyFinder(**{**defaults, **options})


def says(role, content, **more):
    return {"role": role, "content": content, **more}


def without_marks(marked):
    """A text in which the key stands in ⟦ ⟧, and the numbers of the key's characters in it."""
    on_key, text, inside = set(), "", False
    for character in marked:
        if character in "⟦⟧":
            inside = character == "⟦"
            continue
        if inside:
            on_key.add(len(text))
        text += character
    return text, on_key


def key_mask_of(tokenizer, row, template=CHATML, on_missing="error", has_text=True, **options):
    """The column `key_mask` of one row, which has `input_ids` and `labels` already."""
    columns = {name: [value] for name, value in row.items()}
    result = add_key_mask(
        columns, [0], finder(**options), tokenizer, template, "text", has_text, on_missing, "train"
    )  # fmt: skip
    assert result["num_key_tokens"] == [result["key_mask"][0].count(1)]
    return result["key_mask"][0]


def chat_row(tokenizer, messages, template=CHATML):
    """A conversation as SFTTrainer tokenizes it, with a label on every token."""
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return {"messages": messages, "input_ids": token_ids, "labels": list(token_ids)}


def key_tokens(tokenizer, row, mask):
    return " ".join(
        tokenizer.convert_ids_to_tokens(i) for i, key in zip(row["input_ids"], mask, strict=True) if key == 1
    )


class TestWords:
    """The key in the words of a turn, without any token."""

    @pytest.mark.parametrize(
        "options, marked",
        [
            ({}, "<Thinking>a</Thinking>⟦\n<Answer>4</Answer>⟧"),
            ({}, "<Thinking></Thinking>⟦<Answer>4</Answer> \n⟧"),
            ({}, "so <Thinking>a\n\n</Thinking>⟦\r\n\t<Answer>4\n5</Answer> done⟧"),
            ({"key_tags_in_loss": False}, "<Thinking>a</Thinking>\n<Answer> ⟦4 5⟧\n</Answer>⟦ \n⟧"),
            (
                {"thinking_tags": ("<think>", "</think>"), "answer_tags": ("Answer:", "--")},
                "<think>4</think>⟦ Answer: 4 --⟧",
            ),
            ({"key_delimiter": "####"}, "4 + 5\n⟦#### 9⟧"),
            ({"key_delimiter": "####"}, "⟦####9\n⟧"),
            ({"key_delimiter": "####", "key_tags_in_loss": False}, "4 + 5\n####⟦ 9⟧"),
            ({"key_delimiter": "Answer:"}, "The Answer is\n⟦Answer: Answer\n⟧"),
            ({"key_pattern": SENTENCE}, "Add. The answer is ⟦9.⟧"),
            ({"key_pattern": SENTENCE}, "The answer is ⟦9. So it is.\n⟧"),
            ({"key_pattern": BOXED}, r"so \boxed{⟦9}$.⟧"),
            ({"key_pattern": BOXED}, r"so \boxed{⟦\frac{1}{\sqrt{2}}}.⟧"),
            ({"key_pattern": BOXED}, r"\frac{1}{2} is \boxed{⟦{{}}{a}}⟧"),
            ({"key_pattern": r"</think>(?P<key>(?s:.*))"}, "<think>4</think>⟦\n\n9\n⟧"),
        ],
    )
    def test_found(self, options, marked):
        words, on_key = without_marks(marked)
        spans = finder(**options)(words)
        assert {i for start, end in spans for i in range(start, end)} == on_key
        assert sum(end - start for start, end in spans) == len(on_key)

    @pytest.mark.parametrize(
        "options, words, message",
        [
            ({}, "<thinking>a</thinking><answer>4</answer>", "'<Thinking>' is not there"),
            ({}, "<Thinking>a<Thinking></Thinking><Answer>4</Answer>", "'<Thinking>' is there 2 times, not once"),
            ({}, "<Thinking>a</Thinking>4", "'<Answer>' is not there"),
            ({}, "<Thinking>a</Thinking><Answer>4</Answer><Answer>5</Answer>", "'<Answer>' is there 2 times"),
            ({}, "<Thinking>a</Thinking><Answer> </Answer>", "between '<Answer>' and '</Answer>' is empty"),
            ({}, "<Answer>4</Answer><Thinking>a</Thinking>", "are not in this order"),
            ({}, "<Thinking><Answer>4</Answer></Thinking>", "are not in this order"),
            ({}, "<Thinking>a</Thinking>: <Answer>4</Answer>", "there is text between '</Thinking>' and '<Answer>'"),
            ({"key_delimiter": "####"}, "#### 4\n#### 5", "`key_delimiter='####'` is there 2 times"),
            ({"key_delimiter": "####"}, "4\n#### \n", "the text after '####' is empty"),
            ({"key_pattern": BOXED}, r"\boxed{9", "is not there"),
            ({"key_pattern": BOXED}, r"\boxed{} is", "the group `key` of `key_pattern` is empty"),
            ({"key_pattern": BOXED}, r"\boxed{8}, \boxed{9}", "is there 2 times, not once"),
            ({"key_pattern": r"(?P<key>9)?x"}, "x", "the group `key` of `key_pattern` is empty"),
        ],
    )
    def test_not_found(self, options, words, message):
        with pytest.raises(NoKeyError, match=re.escape(message)):
            finder(**options)(words)


# The key's tokens of responses to "What?" in ChatML, in the order of BY_HAND
RESPONSES = {
    "<Thinking>sum</Thinking>\n<Answer>42</Answer>": [
        "Ċ < An sw er > 42 </ An sw er > <|im_end|>",
        ">Ċ< Answer > 42 </ Answer > <|im_end|>",
        "Ċ <Answer> 42 </Answer> <|im_end|>",
        "<0x0A> < Answer > 42 </ Answer > <|im_end|>",
        "▁< Answer > 42 </ Answer > <|im_end|>",
        "< An ##swer > 42 < / An ##swer > <|im_end|>",
        "< Answer > 42 </ Answer > <|im_end|>",
    ],
    # Nothing between the blocks
    "<Thinking>sum</Thinking><Answer>42</Answer>": [
        "< An sw er > 42 </ An sw er > <|im_end|>",
        ">< Answer > 42 </ Answer > <|im_end|>",
        "<Answer> 42 </Answer> <|im_end|>",
        ">< Answer > 42 </ Answer > <|im_end|>",
        ">< Answer > 42 </ Answer > <|im_end|>",
        "< An ##swer > 42 < / An ##swer > <|im_end|>",
        ">< Answer > 42 </ Answer > <|im_end|>",
    ],
    # No reasoning
    "<Thinking></Thinking> <Answer>42</Answer>": [
        "Ġ < An sw er > 42 </ An sw er > <|im_end|>",
        ">Ġ < Answer > 42 </ Answer > <|im_end|>",
        "Ġ <Answer> 42 </Answer> <|im_end|>",
        "▁< Answer > 42 </ Answer > <|im_end|>",
        "▁< Answer > 42 </ Answer > <|im_end|>",
        "< An ##swer > 42 < / An ##swer > <|im_end|>",
        "< Answer > 42 </ Answer > <|im_end|>",
    ],
    # Several lines, white space at the end
    "<Thinking>Add\nthe\ntens</Thinking>\n\n<Answer>is\n42</Answer>\n": [
        "Ċ Ċ < An sw er > is Ċ 42 </ An sw er > Ċ <|im_end|>",
        ">ĊĊ < Answer > is Ċ 42 </ Answer >Ċ <|im_end|>",
        "Ċ Ċ <Answer> is Ċ 42 </Answer> Ċ <|im_end|>",
        "<0x0A> <0x0A> < Answer > is <0x0A> 42 </ Answer > <0x0A> <|im_end|>",
        "▁< Answer > is ▁ 42 </ Answer > <|im_end|>",
        "< An ##swer > is 42 < / An ##swer > <|im_end|>",
        "< Answer > is 42 </ Answer > <|im_end|>",
    ],
    # Line ends of Windows
    "<Thinking>sum\r\n</Thinking>\r\n<Answer>42\r\n</Answer>": [
        "č Ċ < An sw er > 42 č Ċ </ An sw er > <|im_end|>",
        ">čĊ< Answer > 42 č Ċ </ Answer > <|im_end|>",
        "č Ċ <Answer> 42 č Ċ </Answer> <|im_end|>",
        "<0x0D> <0x0A> < Answer > 42 <0x0D> <0x0A> </ Answer > <|im_end|>",
        "▁< Answer > 42 ▁ </ Answer > <|im_end|>",
        "< An ##swer > 42 < / An ##swer > <|im_end|>",
        "< Answer > 42 </ Answer > <|im_end|>",
    ],
    # Emoji of one and of several characters, each of several tokens
    "<Thinking>👍🏽</Thinking>\n<Answer>😀42</Answer>": [
        "Ċ < An sw er > ð Ł ĺ Ģ 42 </ An sw er > <|im_end|>",
        ">Ċ< Answer > ð Ł ĺ Ģ 42 </ Answer > <|im_end|>",
        "Ċ <Answer> ð Ł ĺ Ģ 42 </Answer> <|im_end|>",
        "<0x0A> < Answer > <0xF0> <0x9F> <0x98> <0x80> 42 </ Answer > <|im_end|>",
        "▁< Answer > <unk> 42 </ Answer > <|im_end|>",
        "< An ##swer > [UNK] < / An ##swer > <|im_end|>",
        "< Answer [UNK] 42 </ Answer > <|im_end|>",
    ],
    # Combining marks: NFKC makes one character of the two
    "<Thinking>e\u0301</Thinking>\n<Answer>e\u0301</Answer>": [
        "Ċ < An sw er > e Ì ģ </ An sw er > <|im_end|>",
        ">Ċ< Answer > e Ì ģ </ Answer > <|im_end|>",
        "Ċ <Answer> e Ì ģ </Answer> <|im_end|>",
        "<0x0A> < Answer > e <0xCC> <0x81> </ Answer > <|im_end|>",
        "▁< Answer > <unk> </ Answer > <|im_end|>",
        "< An ##swer > [UNK] < / An ##swer > <|im_end|>",
        "< Answer > [UNK] </ Answer > <|im_end|>",
    ],
    "<Thinking>和</Thinking>\n<Answer>日42</Answer>": [
        "Ċ < An sw er > æ Ĺ ¥ 42 </ An sw er > <|im_end|>",
        ">Ċ< Answer > æ Ĺ ¥ 42 </ Answer > <|im_end|>",
        "Ċ <Answer> æ Ĺ ¥ 42 </Answer> <|im_end|>",
        "<0x0A> < Answer > <0xE6> <0x97> <0xA5> 42 </ Answer > <|im_end|>",
        "▁< Answer > <unk> 42 </ Answer > <|im_end|>",
        "< An ##swer > [UNK] 42 < / An ##swer > <|im_end|>",
        "< Answer > [UNK] </ Answer > <|im_end|>",
    ],
    # Almost tags, in the reasoning and in the answer
    "<Thinking></thinking>< /Thinking></Think ing></Thinking> <Answer></ Answer></Answer>": [
        "Ġ < An sw er > </ Ġ An sw er > </ An sw er > <|im_end|>",
        ">Ġ < Answer ></ Ġ Answer ></ Answer > <|im_end|>",
        "Ġ <Answer> </ Ġ An sw er > </Answer> <|im_end|>",
        "▁< Answer ></ ▁ Answer ></ Answer > <|im_end|>",
        "▁< Answer > </ ▁ Answer > </ Answer > <|im_end|>",
        "< An ##swer > < / An ##swer > < / An ##swer > <|im_end|>",
        "< Answer [UNK] Answer [UNK] Answer > <|im_end|>",
    ],
    # The answer says again what was asked and thought
    "<Thinking>What?42</Thinking>\n<Answer>What?42</Answer>": [
        "Ċ < An sw er > What ? 42 </ An sw er > <|im_end|>",
        ">Ċ< Answer > What ? 42 </ Answer > <|im_end|>",
        "Ċ <Answer> What ? 42 </Answer> <|im_end|>",
        "<0x0A> < Answer > What ? 42 </ Answer > <|im_end|>",
        "▁< Answer > What ? 42 </ Answer > <|im_end|>",
        "< An ##swer > What ? 42 < / An ##swer > <|im_end|>",
        "< Answer > What ? 42 </ Answer > <|im_end|>",
    ],
    # Names of roles, and what looks like a template or a special token
    "<Thinking>assistant<|end|></Thinking>\n<Answer>assistant {{42}}</Answer>": [
        "Ċ < An sw er > assistant Ġ { { 42 } } </ An sw er > <|im_end|>",
        ">Ċ< Answer > assistant Ġ { { 42 } } </ Answer > <|im_end|>",
        "Ċ <Answer> assistant Ġ { { 42 } } </Answer> <|im_end|>",
        "<0x0A> < Answer > assistant ▁ { { 42 } } </ Answer > <|im_end|>",
        "▁< Answer > assistant ▁ { { 42 } } </ Answer > <|im_end|>",
        "< An ##swer > assistant { { 42 } } < / An ##swer > <|im_end|>",
        "< Answer > assistant [UNK] 42 [UNK] Answer > <|im_end|>",
    ],
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_tokens_by_hand(kind):
    tokenizer = BY_HAND[kind]()
    number = list(BY_HAND).index(kind)
    for response, expected in RESPONSES.items():
        row = chat_row(tokenizer, [says("user", "What?"), says("assistant", response)])
        mask = key_mask_of(tokenizer, row)
        assert key_tokens(tokenizer, row, mask) == expected[number], response
        # One run, and what follows it is the line break after the turn
        first, last = mask.index(1), len(mask) - 1 - mask[::-1].index(1)
        assert 0 not in mask[first : last + 1] and len(mask) - last <= 2


def tagged(reasoning, answer):
    return f"<Thinking>{reasoning}</Thinking>\n<Answer>{answer}</Answer>"


CALL = {"type": "function", "function": {"name": "plus", "arguments": {"a": 1}}}
# Template, options, messages, and by hand what the template makes of them with the key in ⟦ ⟧
CONVERSATIONS = {
    "key_at_the_very_end": (
        NO_END, {},
        [says("user", "What?"), says("assistant", tagged("sum", "42"))],
        "User: What?\n\nAssistant: <Thinking>sum</Thinking>⟦\n<Answer>42</Answer>⟧",
    ),
    "tags_in_the_question_and_the_system_turn": (
        CHATML, {},
        [
            says("system", "Say " + tagged("", "")),
            says("user", tagged("sum", "7")),
            says("assistant", tagged("sum", "42")),
        ],
        "<|im_start|>system\nSay <Thinking></Thinking>\n<Answer></Answer><|im_end|>\n"
        "<|im_start|>user\n<Thinking>sum</Thinking>\n<Answer>7</Answer><|im_end|>\n"
        "<|im_start|>assistant\n<Thinking>sum</Thinking>⟦\n<Answer>42</Answer><|im_end|>⟧\n",
    ),
    "last_turn": (
        CHATML, {},
        [
            says("user", "What?"), says("assistant", tagged("a", "7")),
            says("user", "assistant"), says("assistant", tagged("a", "7")),
        ],
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n<Thinking>a</Thinking>\n<Answer>7</Answer>"
        "<|im_end|>\n<|im_start|>user\nassistant<|im_end|>\n"
        "<|im_start|>assistant\n<Thinking>a</Thinking>⟦\n<Answer>7</Answer><|im_end|>⟧\n",
    ),
    "all_turns_that_have_a_key": (
        CHATML, {"key_turns": "all"},
        [
            says("user", "What?"), says("assistant", tagged("a", "7")), says("user", "What?"),
            says("assistant", "What is what?"), says("user", "Add"), says("assistant", tagged("b", "8")),
        ],
        "<|im_start|>user\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n<Thinking>a</Thinking>⟦\n<Answer>7</Answer><|im_end|>⟧\n"
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nWhat is what?<|im_end|>\n"
        "<|im_start|>user\nAdd<|im_end|>\n"
        "<|im_start|>assistant\n<Thinking>b</Thinking>⟦\n<Answer>8</Answer><|im_end|>⟧\n",
    ),
    "tools": (
        TOOLS, {"key_turns": "all"},
        [
            says("user", "sum?"), says("assistant", None, tool_calls=[CALL]), says("tool", tagged("t", "42")),
            says("assistant", "", tool_calls=[CALL]), says("tool", "42"), says("assistant", tagged("sum", "42")),
        ],
        "<|im_start|>user\nsum?<|im_end|>\n<|im_start|>assistant\n<tool_call>plus</tool_call><|im_end|>\n"
        "<|im_start|>tool\n<Thinking>t</Thinking>\n<Answer>42</Answer><|im_end|>\n"
        "<|im_start|>assistant\n<tool_call>plus</tool_call><|im_end|>\n<|im_start|>tool\n42<|im_end|>\n"
        "<|im_start|>assistant\n<Thinking>sum</Thinking>⟦\n<Answer>42</Answer><|im_end|>⟧\n",
    ),
    "template_that_trims": (
        LLAMA_3, {},
        [says("user", " What?\n"), says("assistant", "\n " + tagged("sum ", " 42 ") + " \n\n")],
        "<s><|start|>user<|header|>\n\nWhat?<|end|>"
        "<|start|>assistant<|header|>\n\n<Thinking>sum </Thinking>⟦\n<Answer> 42 </Answer><|end|>⟧",
    ),
    "trailing_white_space": (
        CHATML, {"key_tags_in_loss": False},
        [says("user", " What?\n"), says("assistant", tagged("sum ", " 42 ") + " \n")],
        "<|im_start|>user\n What?\n<|im_end|>\n"
        "<|im_start|>assistant\n<Thinking>sum </Thinking>\n<Answer> ⟦42⟧ </Answer>⟦ \n<|im_end|>⟧\n",
    ),
    "nested_braces": (
        CHATML, {"key_pattern": BOXED},
        [says("user", r"\boxed{7}?"), says("assistant", r"is $\boxed{\frac{1}{2}}$.")],
        "<|im_start|>user\n\\boxed{7}?<|im_end|>\n"
        "<|im_start|>assistant\nis $\\boxed{⟦\\frac{1}{2}}$.<|im_end|>⟧\n",
    ),
    "delimiter": (
        CHATML, {"key_delimiter": "####", "key_tags_in_loss": False},
        [says("user", "#### sum"), says("assistant", "Add 😀\n#### 42")],
        "<|im_start|>user\n#### sum<|im_end|>\n<|im_start|>assistant\nAdd 😀\n####⟦ 42<|im_end|>⟧\n",
    ),
    "special_tokens_in_the_words": (
        CHATML, {},
        [says("user", "<|im_end|>"), says("assistant", tagged("<|im_end|>\n<|im_start|>assistant", "<|im_end|>42"))],
        "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n<Thinking><|im_end|>\n<|im_start|>assistant"
        "</Thinking>⟦\n<Answer><|im_end|>42</Answer><|im_end|>⟧\n",
    ),
    "reasoning_that_is_rewritten": (
        QWEN_3, {"key_pattern": r"</think>(?P<key>(?s:.*))"},
        [
            says("user", "What?"), says("assistant", "<think>a</think>7"),
            says("user", "Add"), says("assistant", "<think>b</think>8"),
        ],
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n<|im_start|>user\nAdd<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nb\n</think>⟦\n\n8<|im_end|>⟧\n",
    ),
    "reasoning_that_is_left_out": (
        QWEN_3, {"key_turns": "all", "key_delimiter": "####"},
        [
            says("user", "What?"), says("assistant", "<think>a</think>is #### 7"),
            says("user", "Add"), says("assistant", "#### 8"),
        ],
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nis ⟦#### 7<|im_end|>⟧\n"
        "<|im_start|>user\nAdd<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦#### 8<|im_end|>⟧\n",
    ),
}  # fmt: skip
# Kind of `characters_of_tokens` that goes with each tokenizer
SLOW_MAPS = {
    split_tags: "byte_level",
    merged_tags: "byte_level",
    whole_tags: "byte_level",
    sentence_piece: "byte_fallback",
}


def slow_mask(function, tokenizer, token_ids, marked):
    """1 on each token that stands for a character in ⟦ ⟧, found byte by byte."""
    expected_text, on_key = without_marks(marked)
    text, characters = characters_of_tokens(SLOW_MAPS[function], tokenizer, token_ids)
    assert text == expected_text
    return [int(any(number in on_key for number in numbers)) for numbers in characters]


@pytest.mark.parametrize("function", SLOW_MAPS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_by_hand(function, name):
    tokenizer = function()
    template, options, messages, marked = CONVERSATIONS[name]
    row = chat_row(tokenizer, messages, template)
    assert key_mask_of(tokenizer, row, template, **options) == slow_mask(function, tokenizer, row["input_ids"], marked)


@pytest.mark.parametrize(
    "template, marked",
    [
        ("CHATML", "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n@⟦\n<Answer>42</Answer><|im_end|>⟧\n"),
        (
            "LLAMA_3",
            "<s><|start|>user<|header|>\n\nWhat?<|end|><|start|>assistant<|header|>\n\n@⟦\n<Answer>42</Answer><|end|>⟧",
        ),
        ("ZEPHYR", "<|user|>\nWhat?</s>\n<|assistant|>\n@⟦\n<Answer>42</Answer></s>⟧\n"),
        ("MISTRAL", "<s>[INST] What? [/INST] @⟦\n<Answer>42</Answer></s>⟧"),
        (
            "GEMMA",
            "<bos><start_of_turn>user\nWhat?<end_of_turn>\n<start_of_turn>model\n@⟦\n<Answer>42</Answer><end_of_turn>⟧\n",
        ),
        ("NO_END", "User: What?\n\nAssistant: @⟦\n<Answer>42</Answer>⟧"),
        ("TEXT_END", "### user:\nWhat?\n[end of turn]\n\n### assistant:\n@⟦\n<Answer>42</Answer>\n[end of turn]⟧\n\n"),
        ("GLM", "[gMASK]<|user|>\nWhat?<|assistant|>\n@⟦\n<Answer>42</Answer>⟧"),
        (
            "QWEN_3",
            "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            "@⟦\n<Answer>42</Answer><|im_end|>⟧\n",
        ),
        (
            "GENERATION",
            "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n@⟦\n<Answer>42</Answer><|im_end|>⟧\n",
        ),
        ("TOOLS", "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n@⟦\n<Answer>42</Answer><|im_end|>⟧\n"),
    ],
)
def test_templates_by_hand(template, marked):
    messages = [says("user", "What?"), says("assistant", tagged("sum", "42"))]
    template = getattr(templates, template)
    for function in SLOW_MAPS:
        tokenizer = function()
        row = chat_row(tokenizer, messages, template)
        expected = slow_mask(function, tokenizer, row["input_ids"], marked.replace("@", "<Thinking>sum</Thinking>"))
        assert key_mask_of(tokenizer, row, template) == expected


class TestTemplatesOfTRL:
    """The templates that TRL ships, which are those of the models: a key with the end of its turn, in each turn."""

    paths = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    # They read messages as lists of text and images
    vision = re.compile("(idefics3|llava_next|smolvlm)(_training)?")
    key = r"\s<Answer>42</Answer>"
    end = r"(<[|｜]?[\w ▁]+[|｜]?>|<turn\|>)"  # some special token

    @pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)
    def test_key(self, path):
        if self.vision.fullmatch(path.stem):
            pytest.skip("its messages are lists of text and images")
        template = path.read_text()
        special = {*re.findall(self.end, template), "<|turn>", "<turn|>", "<start_of_turn>", "<end_of_turn>"}
        tokenizer = split_tags()
        tokenizer.add_special_tokens({"additional_special_tokens": sorted(special), "bos_token": "<s>"})
        response = tagged("sum", "42")
        one = [says("user", "What?"), says("assistant", response)]
        thought = [says("user", "What?"), says("assistant", f"<think>\nAdd\n</think>\n\n{response}")]
        end_of_last = f"{self.end}?" if path.stem == "glm4moe" else self.end
        for messages in (one, one + one, thought + one, one + thought):
            row = chat_row(tokenizer, messages, template)
            assert "42" in tokenizer.convert_ids_to_tokens(row["input_ids"])
            for key_turns in ("last", "all"):
                mask = key_mask_of(tokenizer, row, template, key_turns=key_turns)
                found = tokenizer.decode([i for i, key in zip(row["input_ids"], mask, strict=True) if key == 1])
                before = self.key + self.end if key_turns == "all" and len(messages) == 4 else ""
                assert re.fullmatch(before + self.key + end_of_last, found), (found, messages)


def test_next_role_is_the_end_of_a_turn_without_one():
    tokenizer = split_tags()
    messages = [says("user", "?"), says("assistant", "a #### 7"), says("user", "?"), says("assistant", "b #### 8")]
    row = chat_row(tokenizer, messages, templates.GLM)
    mask = key_mask_of(tokenizer, row, templates.GLM, key_delimiter="####", key_turns="all", key_tags_in_loss=False)
    assert key_tokens(tokenizer, row, mask) == "Ġ 7 <|user|> Ġ 8"


def test_template_that_rewrites_the_tags():
    tokenizer = split_tags()
    row = chat_row(tokenizer, [says("user", "What?"), says("assistant", tagged("sum", "42"))], UPPER_CASE)
    with pytest.raises(ValueError, match="Row 0 of the train .*: the tag '<Thinking>' is not there. Specify where"):
        key_mask_of(tokenizer, row, UPPER_CASE)
    tags = {"thinking_tags": ("<THINKING>", "</THINKING>"), "answer_tags": ("<ANSWER>", "</ANSWER>")}
    mask = key_mask_of(tokenizer, row, UPPER_CASE, **tags)
    assert key_tokens(tokenizer, row, mask) == "Ċ < A N S W E R > 42 </ A N S W E R > <|im_end|>"


class TestForms:
    """The same mask, whatever the columns."""

    prompt = [says("system", "the"), says("user", tagged("sum", "7"))]
    completion = [says("assistant", tagged("sum", "42"))]

    @pytest.mark.parametrize("kind", BY_HAND)
    def test_prompt_completion_and_messages(self, kind):
        tokenizer = BY_HAND[kind]()
        row = chat_row(tokenizer, self.prompt + self.completion)
        expected = key_mask_of(tokenizer, row)
        prompt_text = tokenizer.apply_chat_template(
            self.prompt, chat_template=CHATML, tokenize=False, add_generation_prompt=True
        )
        num_prompt_tokens = len(tokenizer(prompt_text, add_special_tokens=False)["input_ids"])
        labels = [-100] * num_prompt_tokens + row["input_ids"][num_prompt_tokens:]
        pair = {"prompt": self.prompt, "completion": self.completion, "input_ids": row["input_ids"], "labels": labels}
        mask = key_mask_of(tokenizer, pair)
        assert mask == [-1] * num_prompt_tokens + expected[num_prompt_tokens:]
        assert expected[:num_prompt_tokens] == [0] * num_prompt_tokens
        # The columns of other forms may be there, without a value
        assert key_mask_of(tokenizer, {**pair, "messages": None, "tools": None, "chat_template_kwargs": None}) == mask

    @pytest.mark.parametrize("function", [split_tags, merged_tags, whole_tags, sentence_piece])
    def test_tokens(self, function):
        tokenizer = function()
        row = chat_row(tokenizer, self.prompt + self.completion)
        expected = key_mask_of(tokenizer, row)
        tokens = {"input_ids": row["input_ids"], "labels": row["labels"]}
        assert key_mask_of(tokenizer, tokens, has_text=False) == expected  # a label on everything
        start = len(row["input_ids"]) - row["input_ids"][::-1].index(tokenizer.convert_tokens_to_ids("<|im_start|>"))
        labels = [-100] * (start + 2) + row["input_ids"][start + 2 :]
        mask = key_mask_of(tokenizer, {**tokens, "labels": labels}, has_text=False)
        assert mask == [-1] * (start + 2) + expected[start + 2 :]

    @pytest.mark.parametrize("key_turns", ["last", "all"])
    @pytest.mark.parametrize("function", [split_tags, merged_tags, whole_tags, sentence_piece])
    @pytest.mark.parametrize("template", ["CHATML", "LLAMA_3", "GEMMA", "ZEPHYR", "MISTRAL", "QWEN_3"])
    def test_tokens_of_several_turns(self, template, function, key_turns):
        """Keys that users and the system write down are theirs: as tokens with a label on each, and as messages."""
        tokenizer, template = function(), getattr(templates, template)
        messages = [
            says("system", tagged("the", "1")),
            says("user", tagged("is", "2")),
            says("assistant", tagged("sum", "42")),
            says("user", tagged("plus", "3") + "\n"),
            says("assistant", tagged("tens", "7")),
            says("user", tagged("What", "4")),
        ]
        for end in (5, 6):  # with and without a question that is not answered
            row = chat_row(tokenizer, messages[:end], template)
            expected = key_mask_of(tokenizer, row, template, key_turns=key_turns)
            tokens = {"input_ids": row["input_ids"], "labels": row["labels"]}
            assert key_mask_of(tokenizer, tokens, template, has_text=False, key_turns=key_turns) == expected
            # The template that the tokenizer has is the same
            tokenizer.chat_template = template
            assert key_mask_of(tokenizer, tokens, None, has_text=False, key_turns=key_turns) == expected

    def test_every_turn_of_tokens_without_a_template_is_refused(self):
        tokenizer = split_tags()
        row = chat_row(tokenizer, [says("user", tagged("is", "2")), says("assistant", tagged("sum", "42"))])
        tokens = {"input_ids": row["input_ids"], "labels": row["labels"]}
        assert key_mask_of(tokenizer, tokens, None, has_text=False) == key_mask_of(tokenizer, row)
        with pytest.raises(InputError, match="Row 0 of the train dataset: the assistant turns can't be told from"):
            key_mask_of(tokenizer, tokens, None, has_text=False, key_turns="all")

    def test_packed_tokens(self):
        tokenizer = split_tags()
        rows = [
            chat_row(tokenizer, [says("user", "What?"), says("assistant", tagged("a " * number, str(number)))])
            for number in (4, 2, 7)
        ]
        packed = {name: [value for row in rows for value in row[name]] for name in ("input_ids", "labels")}
        packed["seq_lengths"] = [len(row["input_ids"]) for row in rows]
        expected = [value for row in rows for value in key_mask_of(tokenizer, row)]
        assert key_mask_of(tokenizer, packed, has_text=False) == expected
        packed["labels"] = [-100] * packed["seq_lengths"][0] + packed["labels"][packed["seq_lengths"][0] :]
        with pytest.raises(ValueError, match="Row 0 of the train dataset: there is no assistant turn with text"):
            key_mask_of(tokenizer, packed, has_text=False)

    def test_plain_text(self):
        tokenizer = split_tags()
        response = tagged("sum", "42") + "<|end|>"
        token_ids = tokenizer("What? " + response)["input_ids"]
        columns = {"input_ids": token_ids, "labels": token_ids}
        for row in ({"prompt": "What? ", "completion": response, **columns}, {"text": "What? " + response, **columns}):
            mask = key_mask_of(tokenizer, row, template=None)
            assert key_tokens(tokenizer, row, mask) == "Ċ < An sw er > 42 </ An sw er > <|end|>"
        repeated = {
            "prompt": response,
            "completion": response,
            "input_ids": tokenizer(response + response)["input_ids"],
        }
        repeated["labels"] = repeated["input_ids"]
        mask = key_mask_of(tokenizer, repeated, template=None)
        half = len(mask) // 2
        assert mask[:half] == [0] * half
        assert key_tokens(tokenizer, repeated, mask) == "Ċ < An sw er > 42 </ An sw er > <|end|>"

    def test_tokenizer_that_adds_tokens_around_the_text(self):
        tokenizer = sentence_unigram()
        response = tagged("sum", "42") + "<|end|>"
        token_ids = tokenizer("What? " + response)["input_ids"]
        row = {"prompt": "What? ", "completion": response, "input_ids": token_ids, "labels": token_ids}
        mask = key_mask_of(tokenizer, row, template=None)
        assert tokenizer.convert_ids_to_tokens(token_ids)[-2:] == ["<|end|>", "<|end|>"]
        assert key_tokens(tokenizer, row, mask) == "▁< Answer > 42 </ Answer > <|end|>" and mask[-2:] == [1, 0]

    def test_text_and_tokens_that_differ(self):
        tokenizer = split_tags()
        row = chat_row(tokenizer, self.prompt + self.completion)
        row["input_ids"][3] += 1
        with pytest.raises(ValueError, match="Row 0 of the train dataset: the tokens of the rendered text differ"):
            key_mask_of(tokenizer, row)


class TestMissingKeys:
    def rows(self, tokenizer, *responses):
        rows = [chat_row(tokenizer, [says("user", "?"), says("assistant", response)]) for response in responses]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def mark(self, tokenizer, rows, on_missing, **options):
        numbers = list(range(10, 10 + len(rows["labels"])))
        return add_key_mask(rows, numbers, finder(**options), tokenizer, CHATML, "text", True, on_missing, "eval")

    def test_three_ways(self):
        tokenizer = split_tags()
        rows = self.rows(tokenizer, tagged("a", "4"), "4", tagged("a", "4"))
        with pytest.raises(ValueError, match=r"Row 11 of the eval dataset: the tag '<Thinking>' is not there\. Sp"):
            self.mark(tokenizer, rows, "error")
        num_key_tokens = "Ċ < An sw er > 4 </ An sw er > <|im_end|>".count(" ") + 1
        for on_missing, count in (("drop", -1), ("ignore", 0)):
            result = self.mark(tokenizer, rows, on_missing)
            assert result["num_key_tokens"] == [num_key_tokens, count, num_key_tokens]
            assert result["key_mask"][1] == [0] * len(rows["labels"][1])
            examples = [dict(zip(result, values, strict=True)) for values in zip(*result.values(), strict=True)]
            assert [has_whole_key(example) for example in examples] == [True, False, True]

    def test_only_a_missing_key_is_dropped(self):
        tokenizer = split_tags()
        rows = self.rows(tokenizer, tagged("a", "4"))
        rows["input_ids"][0] = rows["input_ids"][0][1:]
        for on_missing in ("error", "drop"):
            with pytest.raises(ValueError, match="Row 10 of the eval dataset: the tokens of the rendered text differ"):
                self.mark(tokenizer, rows, on_missing)
        assert self.mark(tokenizer, rows, "ignore")["num_key_tokens"] == [0]

    def test_key_without_a_label(self):
        tokenizer = split_tags()
        rows = self.rows(tokenizer, tagged("a", "4"))
        rows["labels"][0] = [-100] * len(rows["labels"][0])
        with pytest.raises(ValueError, match="no token of its key is in the loss: check the labels"):
            self.mark(tokenizer, rows, "error")

    def test_no_turn_has_a_key(self):
        tokenizer = split_tags()
        row = chat_row(tokenizer, [says("assistant", "4"), says("user", tagged("a", "4")), says("assistant", "5")])
        with pytest.raises(ValueError, match="the tag '<Thinking>' is not there"):
            key_mask_of(tokenizer, row, key_turns="all")

    def test_truncation(self):
        assert has_whole_key({"key_mask": [-1, 0, 1, 1], "num_key_tokens": 2})
        assert not has_whole_key({"key_mask": [-1, 0, 1], "num_key_tokens": 2})
        assert not has_whole_key({"key_mask": [-1, 0], "num_key_tokens": 2})
        assert not has_whole_key({"key_mask": [1, 0, 0], "num_key_tokens": 1})  # nothing predicts the first token


WORDS = st.text(max_size=12) | st.lists(st.sampled_from(["<", ">", "</", "Thinking", "\n", " ", "👍🏽", "42"])).map(
    "".join
)
TOKENIZERS = {function: function() for function in SLOW_MAPS}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(question=WORDS, reasoning=WORDS, answer=WORDS, separator=st.sampled_from(["", "\n", " ", "\r\n\n", "\t"]))
def test_any_words(question, reasoning, answer, separator):
    response = f"<Thinking>{reasoning}</Thinking>{separator}<Answer>{answer}</Answer>"
    assume(all(response.count(tag) == 1 for tag in TAGS) and answer.strip() and "⟦" not in question + response)
    assume("⟧" not in question + response)
    messages = [says("user", question + TAGS[1]), says("assistant", response)]
    start = (
        f"<|im_start|>user\n{question}</Thinking><|im_end|>\n<|im_start|>assistant\n<Thinking>{reasoning}</Thinking>"
    )
    marked = f"{start}⟦{separator}<Answer>{answer}</Answer><|im_end|>⟧\n"
    for function, tokenizer in TOKENIZERS.items():
        row = chat_row(tokenizer, messages)
        mask = key_mask_of(tokenizer, row)
        assert mask == slow_mask(function, tokenizer, row["input_ids"], marked)
        tokens = {"input_ids": row["input_ids"], "labels": row["labels"]}
        assert key_mask_of(tokenizer, tokens, has_text=False) == mask
