"""Data in all forms: prepared as SFTTrainer prepares it and cached, with each method's loss as it is used."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from fixtures.chat_templates import GENERATION, TEXT_END, TOOLS, ZEPHYR
from helpers import make_trainer
from losses import assert_as_used_is_the_slow_loss, assert_prepared_as_by_sft_trainer
from methods import METHODS, cells, every_method, only, with_references
from transformers import AutoModelForCausalLM, AutoTokenizer


TWO_BATCHES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_length": 200}
QUESTIONS = [
    {
        "question": f"What is {first} plus {second}?",
        "answer": f"{'Step by step. ' * (second % 3)}#### {first + second}",
    }
    for first, second in [(3, 2), (14, 17), (25, 58), (36, 2), (7, 5), (12, 30), (40, 2), (1, 1)]
]
TOOL = {"type": "function", "function": {"name": "add"}}
WITH_TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + TOOLS


# For `assistant_only_loss`, SFTTrainer replaces it with a template that renders the same words differently
QWEN_3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")


@dataclass
class Form:
    """A form of data: how to make a row from a question and an answer, with the options and chat template it needs."""

    row: Callable[[str, str, Any], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    template: str | None = None

    def rows(self, tokenizer) -> Dataset:
        """Eight rows, with PoFT's column."""
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


@every_method
@pytest.mark.parametrize("form", cells("Data", FORMS))
def test_forms(method, form, tiny_model, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = form.template or tokenizer.chat_template
    arguments = (tiny_model, tokenizer, form.rows(tokenizer), tmp_path)
    options = {**TWO_BATCHES, **form.options}
    trainer = assert_as_used_is_the_slow_loss(method, *arguments, **options)
    assert_prepared_as_by_sft_trainer(trainer, *arguments, **options)


@pytest.mark.cell("Data", "chat template from a file")
@every_method
def test_template_of_a_file(method, tiny_model, tokenizer, tmp_path):
    """Its turns end in text."""
    (tmp_path / "chat.jinja").write_text(ZEPHYR)
    options = {**TWO_BATCHES, "chat_template_path": str(tmp_path / "chat.jinja")}
    rows = FORMS["messages"].rows(tokenizer)
    arguments = (tiny_model, copy.deepcopy(tokenizer), rows, tmp_path)
    trainer = assert_as_used_is_the_slow_loss(method, *arguments, **options)
    assert "<|user|>" in tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert_prepared_as_by_sft_trainer(trainer, tiny_model, copy.deepcopy(tokenizer), rows, tmp_path, **options)


@pytest.mark.parametrize("layout", cells("Data", {"streaming": {}, "streaming, packed": {"packing": True}}))
@every_method
def test_streaming(method, layout, tiny_model, tokenizer, tmp_path):
    rows = FORMS["messages"].rows(tokenizer)
    # transformers never ends an epoch of a stream with fewer batches than it accumulates
    options = {"per_device_train_batch_size": 8, "max_length": 200, "max_steps": 1, **layout}
    arguments = (tiny_model, tokenizer, rows.to_iterable_dataset(), tmp_path)
    trainer = assert_as_used_is_the_slow_loss(method, *arguments, **options)
    assert_prepared_as_by_sft_trainer(trainer, *arguments, **options)


@pytest.mark.cell("Data", "streaming, confidence_split='confidence'", refused=True)
@only("sftmix")
def test_streaming_by_confidence(method, tiny_model, tokenizer, rows, tmp_path):
    with pytest.raises(ValueError, match="needs all examples before training, but `train_dataset` is a stream"):
        make_trainer(
            *METHODS[method].classes, tiny_model, tokenizer, rows.to_iterable_dataset(), tmp_path, max_steps=1
        )


@pytest.mark.cell("Data", "dataset_num_proc")
@every_method
def test_several_workers(method, tiny_model, tokenizer, tmp_path):
    """All columns, including annotations, equal those of one worker."""
    arguments = (*METHODS[method].classes, tiny_model, tokenizer, FORMS["messages"].rows(tokenizer), tmp_path)
    options = {**TWO_BATCHES, **METHODS[method].options}
    one, two = (make_trainer(*arguments, dataset_num_proc=number, **options) for number in (None, 2))
    assert list(two.train_dataset) == list(one.train_dataset)


def prepare(method: str, folder: Path, **options):
    """A trainer's prepared training set; rows, model and tokenizer come from a folder, where the cache is too."""
    rows = Dataset.from_json(str(folder / "rows.jsonl"), cache_dir=str(folder / method))
    model, tokenizer = (
        auto_class.from_pretrained(folder / "model") for auto_class in (AutoModelForCausalLM, AutoTokenizer)
    )
    options = {"max_length": 200, "eval_dataset": rows.select(range(4)), **METHODS[method].options, **options}
    trainer = make_trainer(*METHODS[method].classes, model, tokenizer, rows, folder / "run", **options)
    return list(trainer.train_dataset)


def prepare_all(folder: str) -> None:
    for method in METHODS:
        prepare(method, Path(folder))


def cache_files(method: str, folder: Path) -> dict[str, int]:
    """Modification time of each cached file."""
    return {str(path): path.stat().st_mtime_ns for path in (folder / method).rglob("*.arrow")}


OWN_OPTIONS = {
    "sft_go": {"important_fraction": 0.2},
    "sftkey": {"key_pattern": r"(?P<key>\S+ \w+)\s*$"},
    "poft": {"score_end_of_turn": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_factory, tokenizer):
    folder = tmp_path_factory.mktemp("starts")
    tiny_model_factory().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    FORMS["messages"].rows(tokenizer).to_json(folder / "rows.jsonl")
    (folder / "other.jinja").write_text(TEXT_END)
    return folder


@pytest.fixture(scope="module")
def first(folder):
    """Rows and cached files of a first start."""
    return {method: (prepare(method, folder), cache_files(method, folder)) for method in METHODS}


@pytest.mark.cell("Data", "cache: a second run prepares nothing")
def test_second_start(first, folder, other_process):
    assert other_process.run(prepare_all, folder) == 0
    for method, (_, files) in first.items():
        assert len(files) > 4 and cache_files(method, folder) == files, method


@pytest.mark.cell("Data", "cache: a changed option prepares the data again")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {"max_length": 72}) for method in METHODS),
        *((method, {"chat_template_path": "other.jinja"}) for method in METHODS),
        *((method, options) for method, options in OWN_OPTIONS.items() if method in METHODS),
    ],
    ids=str,
)
def test_other_options(method, options, first, folder, tmp_path_factory, monkeypatch):
    """Other options do not reuse the wrong cache: the data is prepared as without a cache."""
    monkeypatch.chdir(folder)
    rows = prepare(method, folder, **options)
    empty = tmp_path_factory.mktemp("empty")
    for name in ("model", "rows.jsonl"):
        (empty / name).symlink_to(folder / name)
    assert rows == prepare(method, empty, **options) != first[method][0]
