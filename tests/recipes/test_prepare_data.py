import json
from pathlib import Path

import pytest
from paper_data import PAPER_DATA
from prepare_data import RECIPES, main


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A file of ten rows of GSM8K, one of which can't be used, in the working directory."""
    rows = [
        {"question": f"{i} + 1?", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(10)
    ]
    rows[3]["answer"] = "4"
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return "raw.jsonl"


def prepare(source, *options):
    main(["gsm8k", "--source", source, "--output", "data", *options])


def refusal(capsys, *arguments):
    """The error message of a program that ends with code 2."""
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--output", "data"])
    return " ".join(capsys.readouterr().err.split())


def read(split):
    return [json.loads(line) for line in Path("data", f"{split}.jsonl").read_text().splitlines()]


def test_the_choices_are_those_of_the_library_and_have_a_recipe():
    assert list(RECIPES) == list(PAPER_DATA)
    for recipe in RECIPES.values():
        assert (REPOSITORY / recipe).is_file()


def test_data_are_written_and_what_was_dropped_is_said(source, capsys):
    prepare(source)
    assert capsys.readouterr().out.splitlines() == [
        "wrote data/train.jsonl  (9 rows)",
        "      dropped 1: its `answer` has no ####, or several",
        "next: trl sft --config recipes/sftkey/qwen3-8b_gsm8k.yaml --dataset_name data",
    ]
    assert read("train")[0] == {
        "prompt": [{"role": "user", "content": "0 + 1?"}], "reasoning": "0 + 1 = 1", "answer": "1",
    }  # fmt: skip


def test_options_arrive(source):
    prepare(source, "--limit", "4", "--test-size", "2", "--seed", "3", "--completion")
    assert (len(read("train")), len(read("test"))) == (4, 2)
    assert all(row["completion"][0]["content"].endswith(f"\n#### {row['answer']}") for row in read("train"))


def test_data_of_other_settings_are_kept(source, capsys):
    prepare(source)
    prepare(source)
    assert "kept  data/train.jsonl" in capsys.readouterr().out
    message = refusal(capsys, "gsm8k", "--source", source, "--limit", "4")
    assert "error: `data/train.jsonl` holds data made with other settings: pass --overwrite" in message
    assert len(read("train")) == 9
    prepare(source, "--limit", "4", "--overwrite")
    assert len(read("train")) == 4


def test_a_split_of_other_settings_is_not_left_beside(source, capsys):
    """Its rows would be in the new training split, too."""
    prepare(source, "--test-size", "2")
    message = refusal(capsys, "gsm8k", "--source", source, "--overwrite")
    assert "error: `--output` holds 'data/test.jsonl', which these settings do not write" in message
    assert len(read("train")) == 7


def test_wrong_input_is_a_short_message(source, capsys):
    message = refusal(capsys, "openbookqa", "--source", source)
    assert "error: Split 'train' of `--source` has no column 'question_stem'" in message
    assert "error: `--limit` is 0" in refusal(capsys, "gsm8k", "--source", source, "--limit", "0")
    assert not Path("data").exists()
