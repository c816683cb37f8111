import json
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("arguments", [[], ["quickstart"], ["inspect"], ["evaluate"]])
def test_help_fits_a_screen_and_shows_an_example(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--help"])
    text = capsys.readouterr().out
    assert "example: hf-sft-variants" in text
    assert len(text.splitlines()) <= 30


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
    assert written.count("wrote") == 2 and "32 train and 8 test rows" in written
    assert "hf-sft-variants evaluate quickstart/model --dataset quickstart/data" in written

    command = ["evaluate", "quickstart/model", "--max-new-tokens", "2", "--device", "cpu", "--json", "figures.json"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    figures = json.loads((quickstart_folder.parent / "figures.json").read_text())
    assert f"held-out NLL       {figures['held_out_nll']:.4f} nats" in printed
    assert "exact match        0.0% (0 of 8)" in printed
    assert figures["rows"] == 8 and figures["exact_match"] == 0


def test_quickstart_keeps_what_is_there(quickstart_folder, capsys):
    command = ["quickstart", "--train-size", "3", "--test-size", "2"]
    assert main(command) == 0
    assert main(command) == 0
    assert capsys.readouterr().out.count("kept") == 2
    assert main([*command, "--seed", "1"]) == 2
    assert "error: `quickstart/data/train.jsonl` holds the data of other settings" in capsys.readouterr().err
    assert main([*command, "--seed", "1", "--overwrite"]) == 0


def test_input_that_cannot_be_used_is_an_error_without_a_traceback(tmp_path, capsys):
    (tmp_path / "test.jsonl").write_text('{"text": "Hi"}\n')
    assert main(["evaluate", "some/model", "--dataset", str(tmp_path)]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("hf-sft-variants: error: `dataset` has no column 'prompt', 'completion', 'answer', only 'text'")
    )


@pytest.mark.parametrize("arguments", [["--batch-size", "0"], ["--max-new-tokens", "many"]])
def test_a_size_must_be_a_positive_number(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "model", *arguments])
    assert arguments[0] in capsys.readouterr().err
