"""The weight of each token, against weights written by hand, and weights that can't be used."""

import copy
import math
from itertools import groupby
from operator import itemgetter

import helpers
import pytest
from datasets import Dataset
from fixtures.chat_templates import CHATML, GEMMA, GENERATION, GLM, LLAMA_3, MISTRAL, QWEN_3, TOOLS, ZEPHYR

from hf_sft_variants import WeightedSFTConfig, WeightedSFTTrainer
from hf_sft_variants.errors import InputError


IDS = list(range(3, 15))
TALK = [
    {"role": "user", "content": "What is two plus two?", "weight": None},
    {"role": "assistant", "content": "It is four", "weight": 0.3},
    {"role": "user", "content": "And one more?", "weight": None},
    {"role": "assistant", "content": "Then five", "weight": 2.0},
]


@pytest.fixture
def prepare(tiny_model, tokenizer, tmp_path):
    """The prepared rows of a data set."""

    def prepare(rows, template=None, **options):
        if template is not None:
            (tmp_path / "template.jinja").write_text(template)
            options["chat_template_path"] = str(tmp_path / "template.jinja")
        rows = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
        own_tokenizer = copy.deepcopy(tokenizer)  # it gets the template
        arguments = (WeightedSFTTrainer, WeightedSFTConfig, tiny_model, own_tokenizer, rows, tmp_path)
        return helpers.make_trainer(*arguments, **{"max_length": 400, **options}).train_dataset

    return prepare


def pieces(row, tokenizer):
    """The row's text, cut wherever the weight changes, each piece with the weight of its tokens."""
    tokens = zip(row["token_weights"], row["input_ids"], strict=True)
    return [
        (tokenizer.decode([token for _, token in of_weight]), weight)
        for weight, of_weight in groupby(tokens, key=itemgetter(0))
    ]


MESSAGES = {
    "ChatML": (
        CHATML,
        [
            ("<|im_start|>user\nWhat is two plus two?<|im_end|>\n", 1.0),
            ("<|im_start|>assistant\nIt is four<|im_end|>\n", 0.3),
            ("<|im_start|>user\nAnd one more?<|im_end|>\n", 1.0),
            ("<|im_start|>assistant\nThen five<|im_end|>\n", 2.0),
        ],
    ),
    "Llama 3": (
        LLAMA_3,
        [
            ("<s><|start|>user<|header|>\n\nWhat is two plus two?<|end|>", 1.0),
            ("<|start|>assistant<|header|>\n\nIt is four<|end|>", 0.3),
            ("<|start|>user<|header|>\n\nAnd one more?<|end|>", 1.0),
            ("<|start|>assistant<|header|>\n\nThen five<|end|>", 2.0),
        ],
    ),
    "Zephyr": (
        ZEPHYR,
        [
            ("<|user|>\nWhat is two plus two?</s>\n", 1.0),
            ("<|assistant|>\nIt is four</s>\n", 0.3),
            ("<|user|>\nAnd one more?</s>\n", 1.0),
            ("<|assistant|>\nThen five</s>\n", 2.0),
        ],
    ),
    "Gemma": (
        GEMMA,
        [
            ("<bos><start_of_turn>user\nWhat is two plus two?<end_of_turn>\n", 1.0),
            ("<start_of_turn>model\nIt is four<end_of_turn>\n", 0.3),
            ("<start_of_turn>user\nAnd one more?<end_of_turn>\n", 1.0),
            ("<start_of_turn>model\nThen five<end_of_turn>\n", 2.0),
        ],
    ),
    "Mistral": (
        MISTRAL,
        [
            ("<s>[INST] What is two plus two? [/INST]", 1.0),
            (" It is four</s>", 0.3),
            ("[INST] And one more? [/INST]", 1.0),
            (" Then five</s>", 2.0),
        ],
    ),
    "GLM": (
        GLM,
        [
            ("[gMASK]<|user|>\nWhat is two plus two?", 1.0),
            ("<|assistant|>\nIt is four", 0.3),
            ("<|user|>\nAnd one more?", 1.0),
            ("<|assistant|>\nThen five", 2.0),
        ],
    ),
}


@pytest.mark.parametrize("template, expected", MESSAGES.values(), ids=MESSAGES)
def test_messages(template, expected, prepare, tokenizer):
    (row,) = prepare([{"messages": TALK}], template, message_weight_key="weight")
    assert pieces(row, tokenizer) == expected


def test_messages_of_a_prompt_and_a_completion(prepare, tokenizer):
    (row,) = prepare([{"prompt": TALK[:3], "completion": TALK[3:]}], CHATML, message_weight_key="weight")
    # The prompt has no labels, whatever its messages weigh
    assert [weight for _, weight in pieces(row, tokenizer)] == [0.0, 2.0]
    assert pieces(row, tokenizer)[1:] == [("Then five<|im_end|>\n", 2.0)]


def test_messages_after_a_prompt_that_opens_the_reasoning(prepare, tokenizer):
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    answer = {"role": "assistant", "content": "<think>\ntwo and two</think>It is four", "weight": 0.5}
    (row,) = prepare([{"prompt": TALK[:1], "completion": [answer]}], template, message_weight_key="weight")
    question = "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    response = "two and two</think>It is four<|im_end|>\n"
    assert pieces(row, tokenizer) == [(question, 0.0), (response, 0.5)]


def test_messages_whose_reasoning_is_left_out(prepare, tokenizer):
    thought = {"role": "assistant", "content": "<think>one</think>It is four", "weight": 0.3}
    (row,) = prepare([{"messages": [TALK[0], thought, *TALK[2:]]}], QWEN_3, message_weight_key="weight")
    assert pieces(row, tokenizer) == [
        ("<|im_start|>user\nWhat is two plus two?<|im_end|>\n", 1.0),
        ("<|im_start|>assistant\nIt is four<|im_end|>\n", 0.3),
        ("<|im_start|>user\nAnd one more?<|im_end|>\n", 1.0),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\nThen five<|im_end|>\n", 2.0),
    ]


def test_messages_around_tool_calls(prepare, tokenizer):
    call = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    messages = [
        TALK[0],
        {"role": "assistant", "content": None, "tool_calls": call, "weight": 0.5},
        {"role": "tool", "content": "4", "weight": 0.1},
        {"role": "assistant", "content": "It is four", "weight": 0.0},
    ]
    (row,) = prepare([{"messages": messages}], TOOLS, message_weight_key="weight")
    assert pieces(row, tokenizer) == [
        ("<|im_start|>user\nWhat is two plus two?<|im_end|>\n", 1.0),
        ("<|im_start|>assistant\n<tool_call>add</tool_call><|im_end|>\n", 0.5),
        ("<|im_start|>tool\n4<|im_end|>\n", 0.1),
        ("<|im_start|>assistant\nIt is four<|im_end|>\n", 0.0),
    ]
    assert all(label == -100 for label, weight in zip(row["labels"], row["token_weights"], strict=True) if not weight)


def test_everything_that_the_template_writes_for_a_message_of_weight_zero_leaves_the_loss(prepare, tokenizer):
    template = GENERATION.replace("{% generation %}", "{% generation %}<think>{{ message.reasoning_content }}</think>")
    first = {**TALK[1], "reasoning_content": "two and two", "weight": 0.0}
    last = {**TALK[3], "reasoning_content": "four and one"}
    rows = [{"messages": [TALK[0], first, TALK[2], last]}]
    (row,) = prepare(rows, template, assistant_only_loss=True, message_weight_key="weight")
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == (
        "<think>four and one</think>Then five<|im_end|>\n"
    )


def test_a_message_in_parts(prepare, tokenizer):
    template = CHATML.replace("message['content']", "message['content'][0]['text']")
    messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in TALK]
    (row,) = prepare([{"messages": messages}], template, message_weight_key="weight")
    assert pieces(row, tokenizer) == MESSAGES["ChatML"][1]


def test_parts_of_a_response(prepare, tokenizer):
    response = "<think>two and two</think>It is four"
    rows = [{"prompt": TALK[:1], "completion": [{"role": "assistant", "content": response}]}]
    options = {"key_pattern": r"</think>(?P<key>(?s:.*))", "thinking_weight": 0.8, "answer_weight": 1.5}
    (row,) = prepare(rows, CHATML, **options)
    assert pieces(row, tokenizer)[1:] == [
        ("<think>two and two</think>", 0.8),
        ("It is four<|im_end|>", 1.5),
        ("\n", 1.0),
    ]
    # As tokens, too
    tokens = [{"input_ids": row["input_ids"], "labels": row["labels"]}]
    (again,) = prepare(tokens, CHATML, **options)
    assert again["token_weights"] == row["token_weights"]


def test_prompts_with_a_weight_have_labels(prepare, tokenizer):
    rows = [{"prompt": "one two ", "completion": "three four"}]
    (plain,), (row,) = prepare(rows), prepare(rows, prompt_weight=0.1)
    assert row["labels"] == row["input_ids"] and -100 in plain["labels"]
    assert row["token_weights"] == [0.1 if label == -100 else 1.0 for label in plain["labels"]]
    assert prepare(rows, prompt_weight=0.0)["labels"][:] == [plain["labels"]]
    rows = [{"messages": [{"role": m["role"], "content": m["content"]} for m in TALK]}]
    (row,) = prepare(rows, GENERATION, assistant_only_loss=True, prompt_weight=0.5)
    assert pieces(row, tokenizer) == [
        ("<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\n", 0.5),
        ("It is four<|im_end|>\n", 1.0),
        ("<|im_start|>user\nAnd one more?<|im_end|>\n<|im_start|>assistant\n", 0.5),
        ("Then five<|im_end|>\n", 1.0),
    ]


def test_a_row_without_a_prompt_has_only_its_response(prepare):
    rows = [{"prompt": "one two ", "completion": "three"}, {"prompt": "", "completion": "three four"}]
    assert set(prepare(rows, prompt_weight=0.1)["token_weights"][1]) == {1.0}


def test_weights_multiply(prepare):
    rows = [{"input_ids": IDS, "labels": [-100, -100, *IDS[2:]], "w": [0.5] * 6 + [2.0] * 6, "q": 3}]
    options = {"token_weight_column": "w", "example_weight_column": "q", "prompt_weight": 0.1}
    (row,) = prepare(rows, **options)
    assert row["token_weights"] == pytest.approx([0.15] * 2 + [1.5] * 4 + [6.0] * 6)


def test_rows_of_weight_zero_are_dropped(prepare, caplog):
    rows = [{"input_ids": IDS, "q": weight} for weight in (1.0, 0.0, 2.0)]
    assert len(prepare(rows, example_weight_column="q")) == 2
    assert "Dropped 1 of 3 examples" in caplog.text


TOKENS = {"input_ids": IDS}
W, Q, KEY = {"token_weight_column": "w"}, {"example_weight_column": "q"}, {"message_weight_key": "weight"}


def talk(number, **changes):
    return {"messages": [{**message, **(changes if i == number else {})} for i, message in enumerate(TALK)]}


@pytest.mark.parametrize(
    "row, options, message",
    [
        ({**TOKENS, "w": [1.0] * 11}, W, "Row 0 of the train dataset: `w` has 11 values, but `input_ids` has 12"),
        ({**TOKENS, "w": [1.0] * 11 + [-0.5]}, W, "`w` has -0.5: give a number of 0 or more"),
        ({**TOKENS, "w": [math.nan] * 12}, W, "`w` has nan: give a number"),
        ({**TOKENS, "w": [math.inf] * 12}, W, "`w` has inf: give a number"),
        ({**TOKENS, "w": [None] + [1.0] * 11}, W, "`w` has None: give a number"),
        ({**TOKENS, "w": ["a"] * 12}, W, "`w` has 'a': give a number"),
        ({**TOKENS, "w": 1.0}, W, "`w` has 1.0, but `input_ids` has 12 tokens; give one for each"),
        ({**TOKENS, "w": None}, W, "`w` has None, but `input_ids` has 12 tokens"),
        (TOKENS, W, "no column `w`, which `token_weight_column` names"),
        ({"text": "one two", "w": [1.0]}, W, "the train dataset has text. Give `input_ids`"),
        (TOKENS, Q, "no column `q`, which `example_weight_column` names"),
        ({**TOKENS, "q": -1.0}, Q, "`q` has -1.0: give a number of 0 or more"),
        ({**TOKENS, "q": math.nan}, Q, "`q` has nan: give"),
        ({**TOKENS, "q": "high"}, Q, "`q` has 'high': give"),
        ({**TOKENS, "q": None}, Q, "`q` has None: give"),
        ({**TOKENS, "q": [1.0, 2.0]}, Q, r"`q` has \[1.0, 2.0\]: give"),
        (TOKENS, KEY, "`message_weight_key='weight'` needs messages"),
        ({"text": "one two"}, KEY, "`message_weight_key='weight'` needs messages"),
        ({"prompt": "a ", "completion": "b"}, KEY, "`message_weight_key='weight'` needs messages"),
        (talk(3, weight=-2.0), KEY, "`weight` of message 3 has -2.0: give"),
        (talk(3, weight=math.inf), KEY, "`weight` of message 3 has inf: give"),
        (talk(0), {"message_weight_key": "wieght"}, "No message of the train dataset has the key `wieght`"),
        ({**TOKENS, "w": [1e6] * 12, "q": 1e5}, {**W, **Q}, "the weights of a token multiply to 100000000000.0"),
        ({**TOKENS, "q": 1e-11}, Q, "the weights of a token multiply to 1e-11"),
        (
            {"prompt": "a ", "completion": "b"},
            {"prompt_weight": 0.5, "completion_only_loss": False},
            "but `completion_only_loss=False` leaves them in",
        ),
        (TOKENS, {"prompt_weight": 0.5}, "every token has a label, so there is no prompt for `prompt_weight=0.5`"),
        (talk(0), {"thinking_weight": 0.5}, "the tag '<Thinking>' is not there. Set `key_delimiter`, `key"),
        (talk(0), {"answer_weight": 0.5, "key_delimiter": "####"}, "`key_delimiter='####'` is not there"),
    ],
)
def test_what_can_not_be_a_weight(row, options, message, prepare):
    with pytest.raises(InputError, match=message):
        prepare([row], CHATML, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt_weight": -0.1}, "`prompt_weight` must be a number of 0 or more, got -0.1"),
        ({"thinking_weight": math.nan}, "`thinking_weight` must be a number of 0 or more, got nan"),
        ({"answer_weight": math.inf}, "`answer_weight` must be a number of 0 or more, got inf"),
        ({"answer_weight": "2"}, "`answer_weight` must be float, got '2'"),
        ({"weight_normalization": "sum"}, "`weight_normalization='sum'` is unknown; choose one of"),
        ({"token_weight_column": " "}, "`token_weight_column=' '` is blank"),
        ({"message_weight_key": ""}, "`message_weight_key=''` is blank"),
        ({**W, "example_weight_column": "w"}, "are both 'w': a weight for each token, or for the row"),
        ({"token_weight_column": "token_weights"}, "`token_weights` is the column that the trainer makes"),
        ({"key_delimiter": "#", "key_pattern": "(?P<key>.)"}, "`key_delimiter` and `key_pattern` both say"),
        ({"key_delimiter": " "}, "`key_delimiter=' '` is blank"),
        ({"key_pattern": "a"}, "`key_pattern='a'` has no group named `key`"),
        ({"key_turns": "first"}, "`key_turns='first'` is unknown"),
        ({"thinking_tags": ["<a>"]}, "`thinking_tags` is"),
    ],
)
def test_settings_that_can_not_be(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        WeightedSFTConfig(str(tmp_path), **helpers.SMALL, **options)


def test_every_row_of_weight_zero(prepare):
    with pytest.raises(InputError, match="The train dataset has no supervised token"):
        prepare([{"input_ids": IDS, "q": 0.0}], **Q)


# Every message is written differently once others follow, so its end is not certain
NUMBERED = CHATML.replace("<|im_end|>", " ({{ loop.length }})<|im_end|>")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_message_that_can_not_be_told_from_the_others(number, prepare):
    talk = [{**message, "weight": 0.5 if i == number else None} for i, message in enumerate(TALK)]
    message = f"Row 0 .*: message {number}, whose `weight` is 0.5, can't be told from its neighbours"
    with pytest.raises(InputError, match=message):
        prepare([{"messages": talk}], NUMBERED, **KEY)


def test_words_in_another_message(prepare):
    """The system's words are in the first question."""
    talk = [{"role": "system", "content": "Be brief", "weight": 0.5}, *TALK]
    with pytest.raises(InputError, match="message 0, whose `weight` is 0.5, can't be told from its neighbours"):
        prepare([{"messages": talk}], MISTRAL, **KEY)
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in talk]
    with pytest.raises(InputError, match="message 0, whose `weight` is 0.5, can't be told from its neighbours"):
        prepare([{"messages": parts}], MISTRAL.replace("message['content']", "message['content'][0]['text']"), **KEY)


def test_labels_tell_which_tokens_are_the_assistants(prepare, tokenizer):
    template = GENERATION.replace("<|im_end|>", " ({{ loop.length }})<|im_end|>")
    talk = [{**message, "weight": 0.0 if i < 3 else 0.5} for i, message in enumerate(TALK)]
    (row,) = prepare([{"messages": talk}], template, assistant_only_loss=True, **KEY)
    assert pieces(row, tokenizer)[-1] == ("Then five (4)<|im_end|>\n", 0.5)
    assert [weight for _, weight in pieces(row, tokenizer)] == [0.0, 0.5]
    # Those of the user are at stake once they have labels
    with pytest.raises(InputError, match="message 0, whose `weight` is 0.0, can't be told"):
        prepare([{"messages": talk}], template, assistant_only_loss=True, prompt_weight=0.5, **KEY)
