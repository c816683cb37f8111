import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_sft_variants import __version__
from hf_sft_variants.cli import main
from hf_sft_variants.quickstart import MODEL_SOURCES, TASKS, model


@pytest.fixture
def quickstart_folder(tmp_path, monkeypatch, tiny_model, tokenizer):
    """An empty working directory, in which the quickstart's model is a tiny one."""
    pytest.importorskip("reasoning_gym", reason="the quickstart's data comes from reasoning-gym")
    monkeypatch.setattr(model, "_load_from_package", lambda: (tiny_model, tokenizer))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "quickstart"


@pytest.mark.parametrize("arguments", [[], ["quickstart"], ["score"], ["inspect"], ["evaluate"], ["compare"]])
def test_help_fits_a_screen_and_shows_an_example(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--help"])
    text = capsys.readouterr().out
    assert "example: hf-sft-variants" in text
    lines = text.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 80


def test_help_does_not_wait_for_torch():
    script = "import sys, hf_sft_variants.cli as cli; cli.build_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"hf-sft-variants {__version__}\n"


def test_the_choices_are_those_of_the_library(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["quickstart", "--help"])
    text = capsys.readouterr().out
    assert f"--task {{{','.join(TASKS)}}}" in text
    assert f"--model-source {{{','.join(MODEL_SOURCES)}}}" in text


def test_quickstart_then_evaluate(quickstart_folder, capsys):
    assert main(["quickstart", "--train-size", "32", "--test-size", "8"]) == 0
    written = capsys.readouterr().out
    assert written.count("wrote") == 3 and "32 train and 8 test rows" in written
    assert "hf-sft-variants evaluate quickstart/model --dataset quickstart/data" in written

    command = ["evaluate", "quickstart/model", "--max-new-tokens", "2", "--device", "cpu", "--json", "figures.json"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    figures = json.loads((quickstart_folder.parent / "figures.json").read_text())
    assert f"held-out NLL       {figures['held_out_nll']:.4f} nats" in printed
    assert "exact match        0.0% (0 of 8)" in printed
    assert figures["rows"] == 8 and figures["exact_match"] == 0


def table(printed):
    """A printed table's cells by model, then by heading."""
    _, heading, *rows = [re.split(r" {2,}", line) for line in printed.splitlines()]
    return {row[0]: dict(zip(heading, row, strict=True)) for row in rows}


def test_several_models_are_a_table(quickstart_folder, tiny_model, tokenizer, capsys):
    assert main(["quickstart", "--train-size", "32", "--test-size", "8"]) == 0
    torch.nn.init.zeros_(tiny_model.model.norm.weight)  # every token as likely as any other
    tiny_model.save_pretrained("uniform_model")
    tokenizer.save_pretrained("uniform_model")
    capsys.readouterr()
    command = ["evaluate", "quickstart/model", "uniform_model", "--max-new-tokens", "2", "--device", "cpu"]
    assert main([*command, "--json", "figures.json"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("quickstart/data, test split, 8 rows\n")
    first, second = json.loads(Path("figures.json").read_text())
    assert first["held_out_nll"] != second["held_out_nll"] == pytest.approx(math.log(len(tokenizer)), rel=1e-5)
    assert list(table(printed)) == [first["model"], second["model"]] == ["quickstart/model", "uniform_model"]
    assert table(printed)["uniform_model"] == {
        "model": "uniform_model",
        "held-out NLL": f"{second['held_out_nll']:.4f}",
        "exact match": "0.0%",
        "last number right": "0.0%",
    }
    assert len({len(line) for line in printed.splitlines()[1:]}) == 1

    assert main(["evaluate", "quickstart/model", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert f"held-out NLL       {first['held_out_nll']:.4f} nats" in capsys.readouterr().out


def test_an_earlier_evaluation_comes_first_in_the_table_and_its_answers_are_shown(quickstart_folder, capsys):
    assert main(["quickstart", "--train-size", "8", "--test-size", "4"]) == 0
    shutil.copytree("quickstart/model", "trained_model")
    capsys.readouterr()
    command = ["evaluate", "quickstart/model", "--max-new-tokens", "4", "--device", "cpu", "--show", "1"]
    assert main([*command, "--json", "before.json"]) == 0
    before = json.loads(Path("before.json").read_text())
    row = json.loads(Path("quickstart/data/test.jsonl").read_text().splitlines()[0])
    answer = indented(before["answers"][0])
    shown = f"question\n{indented(row['prompt'][0]['content'])}\nright answer\n{indented(row['answer'])}\n"
    shown += f"answer of quickstart/model\n{answer}\n"
    assert capsys.readouterr().out.endswith(f"\n\n{shown}")

    before["exact_match"] = 0.25  # nothing is evaluated again
    Path("before.json").write_text(json.dumps(before))
    command[1] = "trained_model"
    assert main([*command, "--earlier", "before.json", "--json", "both.json"]) == 0
    printed, _, answers = capsys.readouterr().out.partition("\n\n")
    assert list(table(printed)) == ["quickstart/model", "trained_model"]
    assert [row["exact match"] for row in table(printed).values()] == ["25.0%", "0.0%"]
    assert answers == f"{shown}answer of trained_model\n{answer}\n"
    assert [result["model"] for result in json.loads(Path("both.json").read_text())] == [*table(printed)]

    command[command.index("4")] = "2"
    assert main([*command, "--earlier", "before.json"]) == 2
    assert (
        "`--earlier` must be the --json of an evaluation with the same settings (dataset 'quickstart/data', split "
        "'test', tagged False, max_new_tokens 2, rows 4), got 'before.json'"
    ) in capsys.readouterr().err


def indented(text):
    return "\n".join(f"    {line}" if line.strip() else line for line in text.splitlines())


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_an_earlier_evaluation_that_cannot_be_read_is_an_error(content, tmp_path, capsys):
    row = {"prompt": [{"role": "user", "content": "?"}], "completion": [], "answer": "5"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    file = tmp_path / "before.json"
    if content is not None:
        file.write_text(content)
    assert main(["evaluate", "some/model", "--dataset", str(tmp_path), "--earlier", str(file)]) == 2
    error = capsys.readouterr().err
    assert "error: `--earlier` " in error and str(file) in error


def test_tagged_responses_are_scored(quickstart_folder, capsys, monkeypatch):
    assert main(["quickstart", "--train-size", "32", "--test-size", "8"]) == 0
    rows = [json.loads(line) for line in Path("quickstart/tagged_data/test.jsonl").read_text().splitlines()]
    texts = [f"<Thinking>a</Thinking>\n<Answer>{row['answer']}</Answer>" for row in rows[:4]]
    texts += [f"<Answer>{row['answer']}" for row in rows[4:6]] + ["<Thinking>a</Thinking>\n<Answer>x</Answer>", ""]
    monkeypatch.setattr("hf_sft_variants.evaluation.generate_answers", lambda *args: texts)
    capsys.readouterr()
    command = ["evaluate", "quickstart/model", "--tagged", "--device", "cpu", "--json", "figures.json"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("quickstart/tagged_data, test split, 8 rows\n")
    figures = json.loads(Path("figures.json").read_text())
    assert figures.pop("held_out_nll") > 0
    assert figures.pop("answers") == texts
    assert figures == {
        "model": "quickstart/model", "adapter": None, "dataset": "quickstart/tagged_data", "split": "test", "rows": 8,
        "tagged": True, "max_new_tokens": 128,
        "accuracy": 0.75, "format_rate": 0.625, "score": pytest.approx(0.7 * 0.75 + 0.3 * 0.625),
    }  # fmt: skip
    row = table(printed)["quickstart/model"]
    assert (row["accuracy"], row["format"], row["score"]) == ("75.0%", "62.5%", "71.2%")


def test_the_rows_before_a_model_that_cannot_be_loaded_are_kept(quickstart_folder, capsys):
    assert main(["quickstart", "--train-size", "8", "--test-size", "4"]) == 0
    capsys.readouterr()
    command = ["evaluate", "quickstart/model", "nowhere/at-all", "--tagged", "--max-new-tokens", "2"]
    assert main([*command, "--device", "cpu", "--json", "figures.json"]) == 2
    captured = capsys.readouterr()
    assert list(table(captured.out)) == ["quickstart/model"] and "'nowhere/at-all'" in captured.err
    assert [figures["model"] for figures in json.loads(Path("figures.json").read_text())] == ["quickstart/model"]


def test_an_adapter_is_for_one_model(capsys):
    assert main(["evaluate", "some/model", "another/model", "--adapter", "runs/lora"]) == 2
    assert "error: `--adapter` is 'runs/lora', which is for one MODEL" in capsys.readouterr().err


def test_quickstart_keeps_what_is_there(quickstart_folder, capsys):
    command = ["quickstart", "--train-size", "3", "--test-size", "2"]
    assert main(command) == 0
    assert main(command) == 0
    assert capsys.readouterr().out.count("kept") == 3
    assert main([*command, "--seed", "1"]) == 2
    assert "error: `quickstart/data/train.jsonl` holds data made with other settings" in capsys.readouterr().err
    assert main([*command, "--seed", "1", "--overwrite"]) == 0


def test_input_that_cannot_be_used_is_an_error_without_a_traceback(tmp_path, capsys):
    (tmp_path / "test.jsonl").write_text('{"text": "Hi"}\n')
    assert main(["evaluate", "some/model", "--dataset", str(tmp_path)]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("hf-sft-variants: error: `dataset` has no column 'prompt', 'completion', 'answer', only 'text'")
    )


def test_data_without_tagged_responses_is_an_error(tmp_path, capsys):
    (tmp_path / "test.jsonl").write_text('{"prompt": [], "answer": "5"}\n')
    assert main(["evaluate", "some/model", "--tagged", "--dataset", str(tmp_path)]) == 2
    assert "`dataset` has no column 'reasoning', only 'prompt', 'answer'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--batch-size", "0"], ["--max-new-tokens", "many"]])
def test_a_size_must_be_a_positive_number(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "model", *arguments])
    assert arguments[0] in capsys.readouterr().err
