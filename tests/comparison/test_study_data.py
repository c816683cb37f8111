"""The rows of the studies: known noise, controls that differ in one thing, and pilots with rows of their own."""

import json
import runpy
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from hf_sft_variants.errors import InputError
from hf_sft_variants.evaluation.answers import extract_answer
from hf_sft_variants.quickstart import build_splits


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "study_data.py"
TASKS = ("leg_counting", "filler", "gsm8k", "chitchat")
SIZES = {"train_size": 12, "validation_size": 3, "test_size": 6}
DIALOGUES = {str(i): {"messages": [[{"text": f"{turn} {i}"}] for turn in "abcdef"]} for i in range(100)}


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Data of every task, and rows for pilots in `pilot`."""
    folder = tmp_path_factory.mktemp("study_data")
    tokenizer.save_pretrained(folder / "model")
    (folder / "gsm8k").mkdir()
    for split, number in (("train", 90), ("test", 20)):
        lines = [
            {"question": f"{split} {i}?", "answer": f"{i} + 1 = <<{i}+1>>{i + 1}\n#### {i + 1}"} for i in range(number)
        ]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    package = ModuleType("chitchat_dataset")
    package.Dataset = lambda: DIALOGUES
    options = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
    options += ["--corrupted", "0.3333", "--gsm8k", "gsm8k", "--model", "model", "--turns", "4", "--tasks", *TASKS]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setitem(sys.modules, "chitchat_dataset", package)
        for more in (["--output", "data"], ["--output", "pilot", "--pilot"]):
            monkeypatch.setattr(sys, "argv", ["study_data.py", *options, *more])
            runpy.run_path(str(SCRIPT), run_name="__main__")
    return folder


@pytest.fixture
def rows_of(folder):
    def read(name, split="train", output="data"):
        lines = (folder / output / name / f"{split}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return read


@pytest.mark.parametrize(("task", "start"), [("chain_sum", "State the final"), ("leg_counting", "Now, how many")])
def test_short_prompts_keep_the_question(task, start, script):
    row = build_splits(task, train_size=1, test_size=1)["train"][0]
    short = script["with_short_prompt"](row)
    system, user = short.pop("prompt")
    assert system == {"role": "system", "content": "Work step by step."}
    assert user["content"].startswith(start) and f"{user['content']}\n" in row["prompt"][0]["content"]
    assert short == {name: value for name, value in row.items() if name != "prompt"}


@pytest.mark.parametrize("task", TASKS)
def test_a_third_of_the_rows_has_the_whole_response_of_another(task, rows_of):
    clean, noisy = rows_of(task), rows_of(f"{task}_noisy")
    responses = [row["completion"] for row in clean]
    assert len(noisy) == 12 and [row["prompt"] for row in noisy] == [row["prompt"] for row in clean]
    assert [row["noisy"] for row in noisy] == [
        row["completion"] != other for row, other in zip(noisy, responses, strict=True)
    ]
    assert sum(row["noisy"] for row in noisy) == 4
    assert all(row["completion"] in responses for row in noisy)
    if task != "chitchat":  # the columns say what the response does
        assert all(extract_answer(row["completion"][0]["content"]) == row["answer"] for row in noisy)
        assert all(row["completion"][0]["content"].startswith(row["reasoning"]) for row in noisy)


@pytest.mark.parametrize("task", ["leg_counting", "filler", "gsm8k"])
def test_wrong_answers_come_after_the_right_reasoning(task, rows_of):
    clean, corrupted = rows_of(task), rows_of(f"{task}_corrupted")
    assert [row["reasoning"] for row in corrupted] == [row["reasoning"] for row in clean]
    wrong = [row["answer"] != other["answer"] for row, other in zip(corrupted, clean, strict=True)]
    assert [row["noisy"] for row in corrupted] == wrong and sum(wrong) == 4


@pytest.mark.parametrize("task", TASKS)
def test_no_row_is_used_twice(task, rows_of):
    sets = [
        rows_of(name, split, output)
        for output in ("data", "pilot")
        for name, split in ((task, "train"), (task, "test"), (task, "validation"), (f"{task}_reference", "train"))
    ]
    assert [len(rows) for rows in sets] == [12, 6, 3, 12] * 2
    prompts = [row["prompt"][0]["content"] for rows in sets for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert rows_of(f"{task}_all") == rows_of(task) + rows_of(f"{task}_reference")
    assert rows_of(f"{task}_noisy", "test") == rows_of(task, "test")


@pytest.mark.parametrize("task", TASKS)
def test_controls_have_the_tokens_of_the_rows(task, rows_of, tokenizer):
    for name in (task, f"{task}_noisy"):
        of_controls = zip(rows_of(name), rows_of(f"{name}_random_groups"), rows_of(f"{name}_random_mask"), strict=True)
        for row, groups, mask in of_controls:
            rendered = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
            assert tokenizer.decode(groups["input_ids"]) == rendered and mask["input_ids"] == groups["input_ids"]
            assert len(groups["random_scores"]) == len(groups["labels"])
            supervised = [label for label in groups["labels"] if label != -100]
            assert tokenizer.decode(supervised).startswith(row["completion"][-1]["content"])
            kept = [a for a, b in zip(mask["labels"], groups["labels"], strict=True) if a == b != -100]
            assert len(kept) == (len(supervised) + 1) // 2 == sum(label != -100 for label in mask["labels"])


@pytest.mark.parametrize("task", ["leg_counting", "gsm8k"])
def test_a_random_span_is_as_long_as_the_answer(task, rows_of, tokenizer):
    starts = set()
    for row in rows_of(f"{task}_random_span"):
        supervised = [i for i, label in enumerate(row["labels"]) if label != -100]
        marked = [i for i, marked in enumerate(row["key_mask"]) if marked]
        assert marked == list(range(marked[0], marked[-1] + 1)) and {*marked} <= {*supervised}
        text = tokenizer.decode(row["labels"][supervised[0] :])
        answer = text[text.index("####") : text.index("<|im_end|>") + len("<|im_end|>")]
        assert len(marked) == len(tokenizer(answer)["input_ids"])
        starts.add(marked[0] - supervised[0])
    assert len(starts) > 3


def test_filler_is_the_same_in_every_response_and_in_one_group(rows_of, tokenizer):
    for row, tokens in zip(rows_of("filler"), rows_of("filler_content_groups"), strict=True):
        supervised = [i for i, label in enumerate(tokens["labels"]) if label != -100]
        content = [tokens["input_ids"][i] for i in supervised if tokens["content_groups"][i] == 1]
        weights = {(tokens["content_groups"][i], round(tokens["content_weights"][i], 9)) for i in supervised}
        assert sorted(weights) == [(0, 0.1), (1, pytest.approx(0.1 + 0.9 * len(supervised) / len(content)))]
        filler = [tokens["input_ids"][i] for i in supervised if tokens["content_groups"][i] == 0]
        steps = len(row["reasoning"].splitlines()) - 2
        assert "Let us work" in tokenizer.decode(filler) and not any(map(str.isdigit, tokenizer.decode(filler)))
        assert tokenizer.decode(filler).count("go on from there:") == steps
        assert tokenizer.decode(content).count(" = ") == steps and "result" not in tokenizer.decode(content)


def test_calculator_marks_are_removed(rows_of):
    responses = [row["completion"][0]["content"] for row in rows_of("gsm8k")]
    assert all("<<" not in response and " + 1 = " in response for response in responses)
    assert all("test" in row["prompt"][0]["content"] for row in rows_of("gsm8k", "test"))
    assert all("train" in row["prompt"][0]["content"] for row in rows_of("gsm8k", "test", "pilot"))


def test_a_dialogue_ends_with_the_turn_that_was_asked_for(rows_of):
    row = rows_of("chitchat")[0]
    assert [message["content"][0] for message in row["prompt"] + row["completion"]] == ["a", "b", "c", "d"]
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]


def test_too_few_rows_are_an_error(script, folder, monkeypatch):
    monkeypatch.chdir(folder)
    options = Namespace(train_size=60, validation_size=0, test_size=1, pilot=False, gsm8k="gsm8k")
    with pytest.raises(InputError, match=r"GSM8K \(train\): there are 90 rows, fewer than 120: ask for fewer"):
        script["splits_of"]("gsm8k", options, None)
