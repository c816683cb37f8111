"""Where the assistant's words and the end of its turn are found, in chat templates of every kind and in tokens."""

import json

import pytest
from fixtures import chat_templates as templates
from fixtures.chat_templates import CHATML, NEEDS_QUESTION, NO_END, QWEN_3, TOOLS
from fixtures.handmade_tokenizers import (
    BY_HAND,
    bert_pieces,
    sentence_piece,
    sentence_unigram,
    split_tags,
    whole_words,
)
from tokenizers import processors
from transformers import ByT5Tokenizer

from hf_sft_variants.errors import InputError
from hf_sft_variants.text.assistant_turns import render_conversation, render_example, render_text
from hf_sft_variants.text.decoded_turns import assistant_header, decode_example
from hf_sft_variants.text.special_tokens import special_token_ids
from hf_sft_variants.text.token_offsets import TokenOffsets, tokenize_with_offsets


def says(role, content, **more):
    return {"role": role, "content": content, **more}


TWO_TURNS = [
    says("system", "the sum"),
    says("user", "What is assistant?"),
    says("assistant", "Add the tens"),
    says("user", "user\n"),
    says("assistant", " 42\n"),
]
TOOL_CALL = {"type": "function", "function": {"name": "plus", "arguments": {"a": 1}}}


def read(tokenizer, rendered):
    """Of each turn the words, and the tokens that follow them up to its end."""
    found = []
    for turn in rendered.turns:
        after = max(rendered.tokens_in(turn.content)) + 1
        tokens = tokenizer.convert_ids_to_tokens(rendered.token_ids[after : turn.end_token])
        found.append((rendered.text[slice(*turn.content)], " ".join(tokens)))
    return found


class TestTemplates:
    @pytest.mark.parametrize(
        "template, first, last",
        [
            ("CHATML", ("Add the tens", "<|im_end|>"), (" 42\n", "<|im_end|>")),
            ("LLAMA_3", ("Add the tens", "<|end|>"), ("42", "<|end|>")),
            ("ZEPHYR", ("Add the tens", "</s>"), (" 42\n", "</s>")),
            ("MISTRAL", ("Add the tens", "</s>"), ("42", "</s>")),
            ("GEMMA", ("Add the tens", "<end_of_turn>"), ("42", "<end_of_turn>")),
            ("NO_END", ("Add the tens", ""), (" 42\n", "")),
            ("TEXT_END", ("Add the tens", "Ċ [ e n d Ġ o f Ġt u r n ]"), (" 42\n", "Ċ [ e n d Ġ o f Ġt u r n ]")),
            ("GLM", ("Add the tens", "<|user|>"), (" 42\n", "")),
            ("QWEN_3", ("Add the tens", "<|im_end|>"), (" 42\n", "<|im_end|>")),
            ("GENERATION", ("Add the tens", "<|im_end|>"), (" 42\n", "<|im_end|>")),
            ("TOOLS", ("Add the tens", "<|im_end|>"), (" 42\n", "<|im_end|>")),
            ("UPPER_CASE", ("ADD THE TENS", "<|im_end|>"), (" 42\n", "<|im_end|>")),
            ("CAPITALIZED", ("Add the tens", "<|im_end|>"), (" 42\n", "<|im_end|>")),
            ("NEEDS_QUESTION", ("Add the tens", "<|im_end|>"), (" 42\n", "<|im_end|>")),
        ],
    )
    def test_two_turns(self, template, first, last):
        tokenizer = split_tags()
        rendered = render_conversation(tokenizer, TWO_TURNS, chat_template=getattr(templates, template))
        assert read(tokenizer, rendered) == [first, last]
        assert rendered.token_ids == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]

    @pytest.mark.parametrize(
        "words", ["assistant", "user", "im_end", "end", "<", "A", "</s>", "{{ message }}", "\ue000x"]
    )
    @pytest.mark.parametrize("template", ["CHATML", "LLAMA_3", "GEMMA", "QWEN_3", "ZEPHYR"])
    def test_words_that_stand_in_the_template(self, template, words):
        tokenizer = split_tags()
        messages = [says("user", words), says("assistant", words), says("user", words), says("assistant", words)]
        rendered = render_conversation(tokenizer, messages, chat_template=getattr(templates, template))
        end = {"LLAMA_3": "<|end|>", "GEMMA": "<end_of_turn>", "ZEPHYR": "</s>"}.get(template, "<|im_end|>")
        assert read(tokenizer, rendered) == [(words, end), (words, end)]

    def test_reasoning_that_later_turns_hide(self):
        tokenizer = split_tags()
        messages = [
            says("user", "is?"),
            says("assistant", "<think>\nis 42\n</think>\n\nis 42"),
            says("user", "What?"),
            says("assistant", "<think>plus</think>the sum"),
        ]
        rendered = render_conversation(tokenizer, messages, chat_template=QWEN_3)
        assert rendered.text.startswith("<|im_start|>user\nis?<|im_end|>\n<|im_start|>assistant\nis 42<|im_end|>")
        assert read(tokenizer, rendered) == [
            ("is 42", "<|im_end|>"),
            ("<think>\nplus\n</think>\n\nthe sum", "<|im_end|>"),
        ]

    def test_earlier_turns_may_be_hidden_but_not_the_last(self):
        tokenizer = split_tags()
        only_last = CHATML.replace("{{ message['content'] }}", "{{ message['content'] if loop.last }}")
        rendered = render_conversation(tokenizer, TWO_TURNS, chat_template=only_last)
        assert read(tokenizer, rendered) == [(" 42\n", "<|im_end|>")]
        with pytest.raises(ValueError, match=r"omits the assistant's text 'Add the tens'... of message 2"):
            render_conversation(tokenizer, TWO_TURNS[:4], chat_template=only_last)

    def test_start_that_the_template_refuses(self):
        tokenizer = split_tags()
        messages = [says("system", "the"), says("assistant", "What is?"), says("user", "sum"), says("assistant", "42")]
        rendered = render_conversation(tokenizer, messages, chat_template=NEEDS_QUESTION)
        assert read(tokenizer, rendered) == [("What is?", "<|im_end|>"), ("42", "<|im_end|>")]
        capitalized = NEEDS_QUESTION.replace("message['content']", "message['content'] | capitalize")
        rendered = render_conversation(tokenizer, messages, chat_template=capitalized)
        assert read(tokenizer, rendered) == [("42", "<|im_end|>")]  # never all that stands before the question

    def test_tools(self):
        tokenizer = split_tags()
        messages = [
            says("user", "sum?"),
            says("assistant", None, tool_calls=[TOOL_CALL]),
            says("tool", "assistant 42"),
            says("assistant", "", tool_calls=[TOOL_CALL]),
            says("tool", "42"),
            says("assistant", "Add", tool_calls=[TOOL_CALL]),
            says("tool", "42"),
            says("assistant", "is 42"),
        ]
        rendered = render_conversation(tokenizer, messages, chat_template=TOOLS)
        call = "< t o o l _ c a l l > plus </ t o o l _ c a l l > <|im_end|>"
        assert read(tokenizer, rendered) == [("Add", call), ("is 42", "<|im_end|>")]

    @pytest.mark.parametrize("kind", BY_HAND)
    def test_tokenizers(self, kind):
        tokenizer = BY_HAND[kind]()
        rendered = render_conversation(tokenizer, TWO_TURNS, chat_template=CHATML)
        assert [rendered.text[slice(*turn.content)] for turn in rendered.turns] == ["Add the tens", " 42\n"]
        ends = [tokenizer.convert_ids_to_tokens(rendered.token_ids[turn.end_token - 1]) for turn in rendered.turns]
        assert ends == ["<|im_end|>", "<|im_end|>"]

    def test_template_of_the_tokenizer_and_its_options(self):
        tokenizer = split_tags()
        tokenizer.chat_template = "{% if brief %}#{% endif %}{{ tools | length }}" + CHATML
        example = {"messages": TWO_TURNS, "tools": json.dumps([{}, {}]), "chat_template_kwargs": {"brief": True}}
        rendered = render_example(example, tokenizer, None, "text")
        assert rendered.text.startswith("#2<|im_start|>system")
        assert read(tokenizer, rendered) == [("Add the tens", "<|im_end|>"), (" 42\n", "<|im_end|>")]

    def test_prompt_and_completion(self):
        tokenizer = split_tags()
        example = {"prompt": TWO_TURNS[:4], "completion": TWO_TURNS[4:], "tools": None}
        rendered = render_example(example, tokenizer, CHATML, "text")
        assert read(tokenizer, rendered) == [(" 42\n", "<|im_end|>")]
        whole = render_example({"messages": TWO_TURNS}, tokenizer, CHATML, "text")
        assert (rendered.text, rendered.token_ids, rendered.turns) == (whole.text, whole.token_ids, whole.turns[1:])

    def test_no_words(self):
        tokenizer = split_tags()
        for messages in ([says("user", "sum")], [says("user", "sum"), says("assistant", " \n")]):
            assert render_conversation(tokenizer, messages, chat_template=CHATML).turns == []


class TestText:
    @pytest.mark.parametrize(
        "function, end", [(split_tags, "<|end|>"), (sentence_piece, "<|end|>"), (sentence_unigram, "<|end|>")]
    )
    def test_prompt_and_completion(self, function, end):
        tokenizer = function()
        rendered = render_example({"prompt": "the sum: ", "completion": "is 42" + end}, tokenizer, None, "text")
        assert read(tokenizer, rendered) == [("is 42", end)]
        assert rendered.token_ids == tokenizer("the sum: is 42" + end)["input_ids"]

    def test_tokens_the_tokenizer_adds_stand_for_no_text(self):
        tokenizer = sentence_unigram()
        rendered = render_text(tokenizer, "", "is 42")  # no end of sequence in the text: the one that is added ends it
        assert tokenizer.convert_ids_to_tokens(rendered.token_ids) == ["<s>", "▁is", "▁", "42", "<|end|>"]
        assert rendered.offsets[0] == (0, 0) and rendered.offsets[-1] == (5, 5)
        assert read(tokenizer, rendered) == [("is 42", "<|end|>")]
        tokenizer = bert_pieces()
        rendered = render_text(tokenizer, "the ", "sum")
        assert tokenizer.convert_ids_to_tokens(rendered.token_ids) == ["[CLS]", "the", "sum", "[SEP]"]
        assert read(tokenizer, rendered) == [("sum", "[SEP]")]

    def test_no_end_of_sequence(self):
        tokenizer = whole_words()
        assert read(tokenizer, render_example({"text": "the sum is 42"}, tokenizer, None, "text")) == [
            ("the sum is 42", "")
        ]

    def test_no_completion(self):
        assert render_text(split_tags(), "the sum", "<|end|>").turns == []


class TestTokens:
    def turns_of(self, tokenizer, text, labelled=None, template=None, every_turn=False):
        """The turns of a text whose tokens have a label where `labelled` has the character."""
        token_ids, offsets = tokenize_with_offsets(tokenizer, text, add_special_tokens=False)
        start = text.index(labelled) if labelled else 0
        end = start + len(labelled or text)
        labels = [i if start <= span[0] < end else -100 for i, span in zip(token_ids, offsets, strict=True)]
        start = assistant_header(tokenizer, template)
        special = special_token_ids(tokenizer)
        rendered = decode_example(TokenOffsets(tokenizer), special, start, token_ids, labels, every_turn)
        return read(tokenizer, rendered)

    chat = "<|im_start|>user\nWhat<|im_end|>\n<|im_start|>assistant\nAdd 42<|im_end|>\n"

    def test_labels_on_the_completion(self):
        tokenizer = split_tags()
        assert self.turns_of(tokenizer, self.chat, "Add 42<|im_end|>\n") == [("Add 42", "<|im_end|>")]
        assert self.turns_of(tokenizer, self.chat, "Add 42") == [("Add 42", "")]
        text = self.chat + self.chat.replace("42", "tens")
        assert self.turns_of(tokenizer, text, "Add tens<|im_end|>\n") == [("Add tens", "<|im_end|>")]

    def test_labels_on_everything(self):
        assert self.turns_of(split_tags(), self.chat) == [
            ("user\nWhat", "<|im_end|>"),
            ("assistant\nAdd 42", "<|im_end|>"),
        ]
        assert self.turns_of(split_tags(), "the sum is 42") == [("the sum is 42", "")]

    def test_only_turns_that_begin_as_the_template_has_it(self):
        tokenizer = split_tags()
        text = "<|im_start|>user assistant\nthe<|im_end|>\n" + 2 * self.chat
        turns = [("Add 42", "<|im_end|>"), ("Add 42", "<|im_end|>")]
        for labelled in (None, 2 * self.chat, "Add 42<|im_end|>\n" + self.chat):
            assert self.turns_of(tokenizer, text, labelled, CHATML, every_turn=True) == turns
        # Labels may begin within the turn, and the template may have nothing to do with the tokens
        assert self.turns_of(tokenizer, self.chat, "42<|im_end|>", CHATML) == [("42", "<|im_end|>")]
        assert self.turns_of(tokenizer, "the sum<|im_end|>", None, CHATML, True) == [("the sum", "<|im_end|>")]

    def test_every_turn_is_refused_where_roles_are_unknown(self):
        tokenizer = split_tags()
        with pytest.raises(InputError, match="none begins with the chat template's header.*set `key_turns='last'`"):
            self.turns_of(tokenizer, self.chat, every_turn=True)
        assert self.turns_of(tokenizer, self.chat, "Add 42<|im_end|>", every_turn=True) == [("Add 42", "<|im_end|>")]
        text = tokenizer.apply_chat_template(2 * TWO_TURNS[1:3], chat_template=NO_END, tokenize=False)
        assert self.turns_of(tokenizer, text, template=NO_END) == [("Add the tens", "")]
        with pytest.raises(InputError, match="no special token ends them"):
            self.turns_of(tokenizer, text, template=NO_END, every_turn=True)

    @pytest.mark.parametrize(
        "template, start",
        [
            ("CHATML", "<|im_start|>assistant\n"),
            ("LLAMA_3", "<|start|>assistant<|header|>\n\n"),
            ("ZEPHYR", "<|assistant|>\n"),
            ("MISTRAL", " [/INST] "),
            ("GEMMA", "<start_of_turn>model\n"),
            ("QWEN_3", "<|im_start|>assistant\n"),
            ("NO_END", "\n\nAssistant: "),
        ],
    )
    def test_what_precedes_the_assistants_words(self, template, start):
        pattern = assistant_header(split_tags(), getattr(templates, template))
        assert pattern.search(f"<s>{start}\nwords")[0] == start.lstrip()
        assert pattern.search("".join(start.split()))

    def test_templates_that_do_not_tell_the_roles(self):
        assert assistant_header(split_tags(), None) is None
        words = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
        assert assistant_header(split_tags(), words) is None
        assert assistant_header(split_tags(), "{{ raise_exception('No') }}") is None

    def test_labels_on_nothing_or_on_white_space(self):
        assert self.turns_of(split_tags(), self.chat, "<|im_end|>\n") == []
        tokenizer = split_tags()
        assert decode_example(TokenOffsets(tokenizer), set(), None, [5, 6], [-100, -100], False).turns == []
        assert decode_example(TokenOffsets(tokenizer), set(), None, [], [], False).turns == []


class TestOffsets:
    def test_spaces_that_the_tokenizer_leaves_out(self):
        tokenizer = split_tags()
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        text = "sum  is\n\n  42 "
        token_ids, offsets = tokenize_with_offsets(tokenizer, text, add_special_tokens=True)
        assert tokenizer.convert_ids_to_tokens(token_ids) == [
            "sum", "Ġ", "Ġis", "Ċ", "Ċ", "Ġ", "Ġ", "42", "Ġ"
        ]  # fmt: skip
        assert [text[start:end] for start, end in offsets] == ["sum", " ", "is", "\n", "\n", " ", " ", "42", " "]

    def test_parts_of_a_character_each_stand_for_it(self):
        for tokenizer in (split_tags(), sentence_piece()):
            token_ids, offsets = tokenize_with_offsets(tokenizer, "42👍", add_special_tokens=False)
            assert offsets[-4:] == [(2, 3)] * 4 and len(token_ids) == len(offsets)

    def test_tokenizer_without_offsets(self):
        tokenizer = ByT5Tokenizer(extra_ids=0)
        text = "sum 和 42"
        token_ids, offsets = tokenize_with_offsets(tokenizer, text, add_special_tokens=False)
        assert token_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [text[start:end] for start, end in offsets if end > start] == list(text)

        class LowerCase(ByT5Tokenizer):
            def _tokenize(self, text):
                return super()._tokenize(text.lower())

        with pytest.raises(ValueError, match=r"LowerCase returns no offsets, and decodes 'Add'\.\.\. to 'add'"):
            tokenize_with_offsets(LowerCase(extra_ids=0), "Add", add_special_tokens=False)

    def test_special_tokens_added_later_count(self):
        tokenizer = split_tags()
        tokenizer.add_tokens(["[later]"], special_tokens=True)
        tokenizer.add_tokens(["[word]"])
        tokens = tokenizer.convert_ids_to_tokens(sorted(special_token_ids(tokenizer)))
        assert {"<|end|>", "<|im_start|>", "[later]"} < set(tokens) and "[word]" not in tokens
        tokenizer.eos_token = "[no such token]"
        assert None not in special_token_ids(tokenizer)
