import json
from pathlib import Path

import pytest

from hf_sft_variants.cli import main
from hf_sft_variants.cli.prepare_data import RECIPES
from hf_sft_variants.sftkey.paper_data import PAPER_DATA


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
    return main(["prepare-data", "gsm8k", "--source", source, "--output", "data", *options])


def read(split):
    return [json.loads(line) for line in Path("data", f"{split}.jsonl").read_text().splitlines()]


def test_the_choices_are_those_of_the_library_and_have_a_recipe():
    assert list(RECIPES) == list(PAPER_DATA)
    for recipe in RECIPES.values():
        assert (REPOSITORY / recipe).is_file()


def test_data_are_written_and_what_was_dropped_is_said(source, capsys):
    assert prepare(source) == 0
    assert capsys.readouterr().out.splitlines() == [
        "wrote data/train.jsonl  (9 rows)",
        "      dropped 1: its `answer` has no ####, or several",
        "next: trl sft --config recipes/sftkey/qwen3-8b_gsm8k.yaml --dataset_name data",
    ]
    assert read("train")[0] == {
        "prompt": [{"role": "user", "content": "0 + 1?"}], "reasoning": "0 + 1 = 1", "answer": "1",
    }  # fmt: skip


def test_options_arrive(source):
    assert prepare(source, "--limit", "4", "--test-size", "2", "--seed", "3", "--completion") == 0
    assert (len(read("train")), len(read("test"))) == (4, 2)
    assert all(row["completion"][0]["content"].endswith(f"\n#### {row['answer']}") for row in read("train"))


def test_data_of_other_settings_are_kept(source, capsys):
    assert prepare(source) == prepare(source) == 0
    assert "kept  data/train.jsonl" in capsys.readouterr().out
    assert prepare(source, "--limit", "4") == 2
    assert "error: `data/train.jsonl` holds the data of other settings: pass --overwrite" in capsys.readouterr().err
    assert len(read("train")) == 9
    assert prepare(source, "--limit", "4", "--overwrite") == 0
    assert len(read("train")) == 4


def test_a_split_of_other_settings_is_not_left_beside(source, capsys):
    """Its rows would be in the new training split, too."""
    assert prepare(source, "--test-size", "2") == 0
    assert prepare(source, "--overwrite") == 2
    assert "error: `--output` holds 'data/test.jsonl', which these settings do not make" in capsys.readouterr().err
    assert len(read("train")) == 7


def test_wrong_input_is_a_short_message(source, capsys):
    assert main(["prepare-data", "openbookqa", "--source", source, "--output", "data"]) == 2
    assert "error: Split 'train' of `--source` has no column 'question_stem'" in capsys.readouterr().err
    assert prepare(source, "--limit", "0") == 2
    assert "error: `--limit` is 0" in capsys.readouterr().err
    assert not Path("data").exists()
