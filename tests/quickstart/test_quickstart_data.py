import json
from pathlib import Path

import pytest
from datasets import load_dataset

from hf_sft_variants.errors import InputError
from hf_sft_variants.evaluation.answers import extract_answer, normalize_number
from hf_sft_variants.quickstart import TASKS, build_splits, data, write_data
from hf_sft_variants.quickstart.data import tagged_splits


reasoning_gym = pytest.importorskip("reasoning_gym", reason="the quickstart's data comes from reasoning-gym")


@pytest.fixture(params=TASKS)
def task(request):
    return request.param


def questions(rows):
    return [row["prompt"][0]["content"] for row in rows]


def test_the_splits_have_the_sizes_that_were_asked_for_and_share_no_question(task):
    splits = build_splits(task, train_size=300, test_size=60)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 300, "test": 60}
    assert len({*questions(splits["train"]), *questions(splits["test"])}) == 360


def test_a_row_is_a_conversation_with_its_reasoning_and_answer(task):
    for row in build_splits(task, train_size=50, test_size=10)["train"]:
        assert list(row) == ["prompt", "completion", "reasoning", "answer"]
        assert [message["role"] for message in row["prompt"] + row["completion"]] == ["user", "assistant"]
        assert row["completion"][0]["content"] == f"{row['reasoning']}\n#### {row['answer']}"
        assert row["reasoning"] and "####" not in row["reasoning"]


def test_the_tagged_splits_are_the_same_problems(task):
    splits = build_splits(task, train_size=30, test_size=10)
    tagged = tagged_splits(splits)
    assert {split: len(rows) for split, rows in tagged.items()} == {"train": 30, "test": 10}
    for row, tagged_row in zip(splits["train"] + splits["test"], tagged["train"] + tagged["test"], strict=True):
        assert list(tagged_row) == ["prompt", "reasoning", "answer"]
        assert (tagged_row["reasoning"], tagged_row["answer"]) == (row["reasoning"], row["answer"])
        (message,), (tagged_message,) = row["prompt"], tagged_row["prompt"]
        assert tagged_message["role"] == "user"
        question, _, instruction = tagged_message["content"].rpartition("\n")
        assert message["content"] == f"{question}\n{data.INSTRUCTION}"
        assert instruction == (
            "Work step by step inside <Thinking></Thinking>, one step a line. "
            "Then give the number inside <Answer></Answer>."
        )


def test_the_answer_is_that_of_reasoning_gym(task):
    settings, _ = TASKS[task]
    problems = reasoning_gym.create_dataset(task, size=400, seed=0, **settings)
    expected = {problem["question"]: normalize_number(problem["answer"]) for problem in problems}
    for row in build_splits(task, train_size=200, test_size=20)["train"]:
        question = row["prompt"][0]["content"].removesuffix(f"\n{data.INSTRUCTION}")
        assert extract_answer(row["completion"][0]["content"]) == row["answer"] == expected[question]


def test_chain_sum_writes_a_running_total():
    problem = {"metadata": {"expression": "15 - 43 - 75"}}
    assert TASKS["chain_sum"][1](problem) == "15 - 43 = -28\n-28 - 75 = -103"


def test_the_steps_of_chain_sum_are_right():
    for row in build_splits(train_size=200, test_size=1)["train"]:
        totals = []
        for step in row["reasoning"].splitlines():
            left, _, right = step.partition(" = ")
            first, operator, second = left.split()
            assert int(right) == int(first) + int(operator + second)
            assert not totals or first == totals[-1]
            totals.append(right)
        assert totals[-1] == row["answer"]


def test_leg_counting_writes_a_line_for_each_animal_and_no_total():
    for row in build_splits("leg_counting", train_size=200, test_size=1)["train"]:
        question = row["prompt"][0]["content"]
        products = []
        for step in row["reasoning"].splitlines():
            animals, product = step.split(": ")
            assert animals in question
            factors, product = product.split(" = ")
            count, legs = factors.split(" * ")
            assert int(product) == int(count) * int(legs) and animals.startswith(f"{count} ")
            products.append(int(product))
        assert len(products) in (2, 3) and sum(products) == int(row["answer"])
        # A total that equals one of the products means that the other animals have no legs
        assert products.count(0) >= len(products) - 1 or int(row["answer"]) not in products


def write_splits(task, path):
    Path(path).write_text(json.dumps(build_splits(task, 20, 5, seed=3)))


def test_the_same_seed_gives_the_same_rows_in_another_process(task, tmp_path, other_process):
    assert other_process.run(write_splits, task, tmp_path / "splits.json") == 0
    assert json.loads((tmp_path / "splits.json").read_text()) == build_splits(task, 20, 5, seed=3)


def test_neighbouring_seeds_give_other_rows():
    first, second = (questions(build_splits("gsm_symbolic", 100, 10, seed=seed)["train"]) for seed in (0, 1))
    assert not {*first} & {*second}


def test_the_test_split_does_not_depend_on_the_train_size(task):
    small, large = build_splits(task, 10, 8), build_splits(task, 100, 8)
    assert small["test"] == large["test"]
    assert small["train"] == large["train"][:10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "codeio"}, "`task` must be one of chain_sum, gsm_symbolic, leg_counting, got 'codeio'"),
        ({"train_size": 0}, "`train_size` must be an integer of at least 1, got 0"),
        ({"test_size": -1}, "`test_size` must be an integer of at least 1, got -1"),
        ({"seed": -1}, "`seed` must be an integer of at least 0, got -1"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        build_splits(**arguments)


def test_a_task_with_too_few_questions_is_an_error(monkeypatch):
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    monkeypatch.setitem(data.TASKS, "chain_sum", (settings, TASKS["chain_sum"][1]))
    assert len(build_splits(train_size=190, test_size=10)["train"]) == 190
    with pytest.raises(InputError, match="ask for 201 distinct questions.*gave only 200"):
        build_splits(train_size=191, test_size=10)


def test_the_written_folder_loads_with_both_splits(tmp_path):
    problems = build_splits(train_size=12, test_size=4)
    for name, splits in (("data", problems), ("tagged_data", tagged_splits(problems))):
        assert write_data(tmp_path / name, splits)
        loaded = load_dataset(str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        assert {split: rows.to_list() for split, rows in loaded.items()} == splits


def test_the_same_data_is_not_written_again(tmp_path):
    splits = build_splits(train_size=5, test_size=2)
    write_data(tmp_path, splits)
    assert not write_data(tmp_path, splits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]


def test_other_data_is_replaced_only_when_told_to(tmp_path):
    write_data(tmp_path, build_splits(train_size=5, test_size=2))
    before = (tmp_path / "train.jsonl").read_bytes()
    other = build_splits(train_size=6, test_size=2)
    with pytest.raises(InputError, match=r"train\.jsonl.*--overwrite"):
        write_data(tmp_path, other)
    assert (tmp_path / "train.jsonl").read_bytes() == before
    assert write_data(tmp_path, other, overwrite=True)
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 6
