"""The same questions and answers in every form of data that SFTTrainer reads."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from methods import with_references
from templates_on_the_spot import GENERATION, TOOLS, ZEPHYR


QUESTIONS = [
    {
        "question": f"What is {first} plus {second}?",
        "answer": f"{'Step by step. ' * (second % 3)}#### {first + second}",
    }
    for first, second in [(3, 2), (14, 17), (25, 58), (36, 2), (7, 5), (12, 30), (40, 2), (1, 1)]
]
TOOL = {"type": "function", "function": {"name": "add"}}
WITH_TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + TOOLS


# Its words are rendered otherwise in the template that SFTTrainer takes in its place for `assistant_only_loss`
QWEN_3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")


@dataclass
class Form:
    """
    A form of data.

    Attributes:
        row (`Callable`):
            Makes a row of question, answer and tokenizer.
        options (`dict[str, Any]`):
            What the configuration is given.
        template (`str`, *optional*):
            The tokenizer's chat template, where the fixture's own does not do.
    """

    row: Callable[[str, str, Any], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    template: str | None = None

    def rows(self, tokenizer) -> Dataset:
        """Eight rows, in PoFT's column too."""
        rows = [self.row(*question.values(), tokenizer) for question in QUESTIONS]
        return with_references(Dataset.from_list(rows))


def text(question, answer, tokenizer):
    return {"text": f"{question} {answer}"}


def question_and_answer(question, answer, tokenizer):
    return {"question": question, "answer": answer}


def joined(row):
    """A formatting function."""
    return f"Question: {row['question']}\nAnswer: {row['answer']}"


def plain(question, answer, tokenizer):
    return {"prompt": f"{question} ", "completion": answer}


def conversation(question, answer, tokenizer):
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def messages(question, answer, tokenizer):
    first = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Ask me"}]
    row = conversation(question, answer, tokenizer)
    return {"messages": first + row["prompt"] + row["completion"]}


def sharegpt(question, answer, tokenizer):
    return {"conversations": [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]}


def tool_calls(question, answer, tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"first": 1}}}
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "Let me see", "tool_calls": [call]},
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": answer},
        ],
        "tools": json.dumps([TOOL]),
    }


def tokens(question, answer, tokenizer):
    return {"input_ids": tokens_with_mask("mask", question, answer, tokenizer)["input_ids"]}


def tokens_with_labels(question, answer, tokenizer):
    row = tokens_with_mask("mask", question, answer, tokenizer)
    labels = [token if kept else -100 for token, kept in zip(row["input_ids"], row.pop("mask"), strict=True)]
    return {**row, "labels": labels}


def tokens_with_completion_mask(question, answer, tokenizer):
    return tokens_with_mask("completion_mask", question, answer, tokenizer)


def tokens_with_assistant_masks(question, answer, tokenizer):
    return tokens_with_mask("assistant_masks", question, answer, tokenizer)


def tokens_with_mask(column, question, answer, tokenizer):
    prompt, completion = conversation(question, answer, tokenizer).values()
    input_ids = tokenizer.apply_chat_template(prompt + completion)["input_ids"]
    num_prompt = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
    return {"input_ids": input_ids, column: [0] * num_prompt + [1] * (len(input_ids) - num_prompt)}


FORMS = {
    "text": Form(text),
    "prompt and completion, texts": Form(plain),
    "prompt and completion, messages": Form(conversation),
    "messages": Form(messages),
    "conversations (from, value)": Form(sharegpt),
    "pre-tokenized, without labels": Form(tokens),
    "pre-tokenized, with labels": Form(tokens_with_labels),
    "pre-tokenized, with completion_mask": Form(tokens_with_completion_mask, {"completion_only_loss": True}),
    "pre-tokenized, with assistant_masks": Form(tokens_with_assistant_masks),
    "assistant_only_loss=True": Form(messages, {"assistant_only_loss": True}, GENERATION),
    "assistant_only_loss=True, in TRL's training template": Form(messages, {"assistant_only_loss": True}, QWEN_3),
    "completion_only_loss=True": Form(plain, {"completion_only_loss": True}),
    "completion_only_loss=False": Form(conversation, {"completion_only_loss": False}),
    "tool calls": Form(tool_calls, template=WITH_TOOLS),
    "formatting_func": Form(question_and_answer, {"formatting_func": joined}),
}
# For `chat_template_path`: its turns end in text
TEMPLATE_OF_FILE = ZEPHYR
