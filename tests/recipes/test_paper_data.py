"""The paper's data rules, on rows with the columns of the Hub's."""

from collections import Counter

import pytest
from datasets import Dataset, load_dataset
from paper_data import PAPER_DATA, cot_collection, gsm8k, openbookqa, openr1_math
from paper_splits import load_source, prepare_splits

from hf_sft_variants.errors import InputError
from hf_sft_variants.quickstart import write_data


def gsm8k_row(i=0, **columns):
    return {
        "question": f"What is {i} plus 1? ",
        "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}",
        **columns,
    }


def generation(reasoning="Let me see.\n1 + 1 = 2, so \\boxed{2}.", answer="The sum is \\boxed{2}."):
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


def openr1_row(**columns):
    return {
        "problem": "What is $1 + 1$?",
        "answer": "2",
        "generations": [generation("wrong"), generation(), generation("another way")],
        "correctness_math_verify": [False, True, True],
    } | columns


def cot_row(**columns):
    return {
        "source": "Is the sky blue?\n- yes\n- no",
        "rationale": "It scatters blue light.",
        "target": "yes",
    } | columns


def openbookqa_row(**columns):
    return {
        "question_stem": "The sun is responsible for",
        "choices": {"text": ["puppies learning new tricks", "plants sprouting"], "label": ["A", "B"]},
        "answerKey": "B",
        "fact1": "the sun is the source of energy for plants",
    } | columns


ROWS = {"gsm8k": gsm8k_row, "openr1-math": openr1_row, "cot-collection": cot_row, "openbookqa": openbookqa_row}


def parts(converted):
    (message,) = converted.row["prompt"]
    assert message["role"] == "user" and list(converted.row) == ["prompt", "reasoning", "answer"]
    assert converted.reason is None
    return message["content"], converted.row["reasoning"], converted.row["answer"]


def test_gsm8k_is_split_at_its_mark_without_calculator_marks():
    row = {
        "question": "How many clips?",
        "answer": "In May 48/2 = <<48/2=24>>24 clips.\nThat is $<<48+24=72>>72, and 1 < 2 >> 0.\n#### 1,072",
    }
    reasoning = "In May 48/2 = 24 clips.\nThat is $72, and 1 < 2 >> 0."
    assert parts(gsm8k(row)) == ("How many clips?", reasoning, "1,072")


@pytest.mark.parametrize("answer", ["1 + 1 = 2", "1 + 1 = 2\n#### 2\n#### 3"])
def test_gsm8k_without_one_mark_is_dropped(answer):
    assert gsm8k(gsm8k_row(answer=answer)) == (None, "its `answer` has no ####, or several")


def test_openr1_takes_the_block_of_the_first_verified_generation():
    reasoning = "Let me see.\n1 + 1 = 2, so \\boxed{2}."
    assert parts(openr1_math(openr1_row())) == ("What is $1 + 1$?", reasoning, "2")


def test_openr1_passes_over_a_verified_generation_without_one_whole_block():
    broken = [
        "1 + 1 = 2",
        "<think>1 + 1",
        "<think>a</think>b</think>",
        "First <think>a</think>",
        "<think>a<think></think>",
    ]
    row = openr1_row(generations=[*broken, generation("good")], correctness_math_verify=[True] * 6)
    assert parts(openr1_math(row))[1] == "good"
    row = openr1_row(generations=broken, correctness_math_verify=[True] * 5)
    assert openr1_math(row) == (None, "no verified generation has one whole <think> block")


@pytest.mark.parametrize("verified", [[False] * 3, [], None, [None] * 3])
def test_openr1_without_a_verified_generation_is_dropped(verified):
    assert (
        openr1_math(openr1_row(correctness_math_verify=verified)).reason == "no generation is verified by math-verify"
    )


def test_cot_collection_has_its_parts_as_columns():
    assert parts(cot_collection(cot_row())) == tuple(cot_row().values())


def test_openbookqa_answers_with_letter_and_text():
    question = "The sun is responsible for\n(A) puppies learning new tricks\n(B) plants sprouting"
    fact = "the sun is the source of energy for plants"
    assert parts(openbookqa(openbookqa_row())) == (question, fact, "(B) plants sprouting")
    assert openbookqa(openbookqa_row(answerKey="E")) == (None, "its `answerKey` is none of its choices")


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"source": " \n"}, "its question is blank"),
        ({"rationale": None}, "its reasoning is blank"),
        ({"target": ""}, "its answer is blank"),
        ({"rationale": "so.</Thinking> And"}, "its reasoning has the tag </Thinking>"),
        ({"target": "<Answer>yes"}, "its answer has the tag <Answer>"),
    ],
)
def test_a_row_that_lacks_a_part_or_has_a_tag_is_dropped(columns, reason):
    assert cot_collection(cot_row(**columns)) == (None, reason)


def test_a_tag_in_the_question_does_no_harm():
    assert parts(cot_collection(cot_row(source="What is </Thinking>?")))[0] == "What is </Thinking>?"


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("gsm8k", {"answer": 5}, "Row 1 of split 'train': `answer` is 5: pass a text"),
        ("openr1-math", {"generations": "<think>"}, "Row 1 of split 'train': `generations` is '<think>': pass a list"),
        ("openbookqa", {"choices": {"text": ["a"], "label": []}}, "Row 1 of split 'train': `choices` is"),
    ],
)
def test_a_value_of_another_kind_is_an_error_that_names_its_row(name, columns, message):
    with pytest.raises(InputError, match=message):
        prepare_splits(name, {"train": [ROWS[name](), ROWS[name](**columns)]})


def splits_of(train, **others):
    return {split: Dataset.from_list(rows) for split, rows in {"train": train, **others}.items()}


def answers(split):
    return [row["answer"] for row in split.rows]


def test_dropped_rows_are_counted_and_the_order_is_kept():
    rows = [gsm8k_row(i) for i in range(6)]
    rows[1]["answer"] = rows[3]["answer"] = "7"
    rows[4]["answer"] = "#### 5"
    prepared = prepare_splits("gsm8k", splits_of(rows, test=[gsm8k_row(9)]))
    assert answers(prepared["train"]) == ["1", "3", "6"] and answers(prepared["test"]) == ["10"]
    assert prepared["train"].dropped == {"its `answer` has no ####, or several": 2, "its reasoning is blank": 1}
    assert prepared["test"].dropped == Counter()


def test_a_limit_draws_rows_that_can_be_used():
    rows = [gsm8k_row(i) | ({"answer": "7"} if i % 2 else {}) for i in range(40)]
    first, same, other = (prepare_splits("gsm8k", splits_of(rows), limit=10, seed=seed) for seed in (0, 0, 1))
    assert len(first["train"].rows) == 10 and first == same
    assert sorted(answers(first["train"])) != sorted(answers(other["train"]))
    assert answers(first["train"]) == answers(prepare_splits("gsm8k", splits_of(rows), limit=15)["train"])[:10]


def test_a_test_split_is_drawn_and_shares_no_question():
    rows = [gsm8k_row(i % 30) for i in range(40)]
    small, large = (prepare_splits("gsm8k", splits_of(rows), test_size=8, limit=limit) for limit in (5, None))
    assert small["test"].rows == large["test"].rows and len(small["test"].rows) == 8
    assert list(small) == ["train", "test"] and small["train"].rows == large["train"].rows[:5]
    assert not {*answers(large["train"])} & {*answers(large["test"])}
    dropped = large["train"].dropped["its question is in the test split"]
    assert len(large["train"].rows) + dropped == 32 and dropped > 0


def test_a_completion_is_the_untagged_response():
    (row,) = prepare_splits("gsm8k", splits_of([gsm8k_row(1)]), with_completion=True)["train"].rows
    assert row["completion"] == [{"role": "assistant", "content": "1 + 1 = 2\n#### 2"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "`--limit` is 0"),
        ({"test_size": -1}, "`--test-size` is -1"),
        ({"seed": -1}, "`--seed` is -1"),
        ({"test_size": 3}, "`--test-size` is 3, but 2 rows can be used"),
        ({"test_size": 2}, "Split 'train' has no row that can be used as gsm8k .it is empty."),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        prepare_splits("gsm8k", splits_of([gsm8k_row(0), gsm8k_row(1)]), **arguments)


def test_a_test_split_is_not_drawn_beside_another():
    with pytest.raises(InputError, match="`--test-size` is 1, .* the source has 'train', 'test': leave it out"):
        prepare_splits("gsm8k", splits_of([gsm8k_row(0)], test=[gsm8k_row(1)]), test_size=1)


def test_a_split_without_a_usable_row_is_an_error():
    message = "Split 'test' has no row that can be used as gsm8k .1 dropped: its `answer` has no ####, or several."
    with pytest.raises(InputError, match=message):
        prepare_splits("gsm8k", splits_of([gsm8k_row(0)], test=[gsm8k_row(1, answer="7")]))


@pytest.mark.parametrize("name", PAPER_DATA)
def test_a_folder_or_a_file_is_read_with_the_columns_that_are_needed(name, tmp_path):
    assert set(ROWS[name]()) == set(PAPER_DATA[name].columns)
    write_data(tmp_path / "raw", {"train": [ROWS[name](other="x")], "test": [ROWS[name](other="y")] * 2})
    splits = load_source(name, str(tmp_path / "raw"))
    assert {split: rows.num_rows for split, rows in splits.items()} == {"train": 1, "test": 2}
    assert splits["train"][0] == ROWS[name]()
    splits["train"].to_parquet(tmp_path / "raw.parquet")
    assert load_source(name, str(tmp_path / "raw.parquet"))["train"][0] == ROWS[name]()


def test_the_hub_is_asked_for_the_right_subset(monkeypatch):
    calls = []

    def load(*arguments, **options):
        calls.append((*arguments, options))
        return {}

    monkeypatch.setattr("paper_splits.load_dataset", load)
    for name in PAPER_DATA:
        load_source(name)
    load_source("openr1-math", subset="all")
    load_source("gsm8k", "another/id")
    assert calls == [
        ("openai/gsm8k", "main", {"revision": None}),
        ("open-r1/OpenR1-Math-220k", "default", {"revision": None}),
        ("kaist-ai/CoT-Collection", None, {"revision": "refs/convert/parquet"}),
        ("allenai/openbookqa", "additional", {"revision": None}),
        ("open-r1/OpenR1-Math-220k", "all", {"revision": None}),
        ("another/id", None, {}),
    ]


def test_a_source_with_other_columns_is_an_error(tmp_path):
    write_data(tmp_path, {"train": [gsm8k_row()]})
    message = "Split 'train' of `--source` has no column 'source', 'rationale', 'target', only 'question', 'answer'"
    with pytest.raises(InputError, match=message):
        load_source("cot-collection", str(tmp_path))


def test_a_source_that_cannot_be_loaded_is_an_error(tmp_path):
    (tmp_path / "rows.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "rows.txt", "pass a file that ends in .json, .jsonl, .parquet, .csv"),
        (tmp_path / "empty", r"could not be loaded \(.+\): pass a folder or a file with rows like those of the Hub"),
    ):
        with pytest.raises(InputError, match=f"`--source` (is )?'{source}'.*{message}"):
            load_source("gsm8k", str(source))


def test_the_written_folder_loads_with_its_splits(tmp_path):
    prepared = prepare_splits("gsm8k", splits_of([gsm8k_row(i) for i in range(4)]), test_size=1)
    write_data(tmp_path / "data", {split: rows for split, (rows, _) in prepared.items()})
    loaded = load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert {split: rows.to_list() for split, rows in loaded.items()} == {s: p.rows for s, p in prepared.items()}
