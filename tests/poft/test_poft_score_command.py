import json
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset
from helpers import make_trainer, scores_in
from poft_references import save_reference
from scoring_that_is_killed import score

from hf_sft_variants import PoFTConfig, PoFTTrainer
from hf_sft_variants.cli import main
from hf_sft_variants.poft import reference_scoring
from hf_sft_variants.poft.score_files import add_content_keys, keys_of_best


@pytest.fixture
def folder(tiny_model, tokenizer, chat_rows, tmp_path, monkeypatch):
    """A working directory with a model, two references, data and a recipe."""
    monkeypatch.chdir(tmp_path)
    tiny_model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    models = [save_reference(family, tmp_path / family, seed) for seed, family in enumerate(("llama_3", "zephyr"))]
    for split, rows in (("train", chat_rows), ("test", chat_rows.select(range(3)))):
        Path("data").mkdir(exist_ok=True)
        rows.to_json(f"data/{split}.jsonl")
    recipe = {
        "module": "hf_sft_variants.poft",
        "reference_models": models,
        "score_cache_dir": "scores",
        "model_name_or_path": "model",
        "dataset_name": "data",
        "output_dir": "run",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return tmp_path


def test_fills_the_cache_and_writes_files(folder, tiny_model, tokenizer, capsys, monkeypatch):
    (folder / "model" / "model.safetensors").unlink()  # the trained model's weights are not needed
    keep = ["--keep-top", "0.25", "--kept", "kept/train.jsonl"]
    evaluate = ["--eval_strategy", "steps", "--eval_steps", "1"]
    assert main(["score", "--config", "recipe.yaml", "--output", "scores.parquet", *keep, *evaluate]) == 0
    printed = capsys.readouterr().out
    for model in ("llama_3", "zephyr"):
        assert f"{model} on the train dataset: -" in printed and f"{model} on the eval dataset: -" in printed
    assert "wrote scores.parquet" in printed and "wrote kept/train.jsonl: the best 3 of 12 rows" in printed
    # The test rows are among the training rows
    assert [len(scores) for scores in scores_in(folder / "scores").values()] == [12, 12]
    assert not (folder / "run").exists()

    # Training finds them, here and, by the file, elsewhere
    monkeypatch.setattr(reference_scoring, "load_reference_model", None)  # must not be called
    rows = load_dataset("data", split="train")
    models = yaml.safe_load(Path("recipe.yaml").read_text())["reference_models"]
    common = (PoFTTrainer, PoFTConfig, tiny_model, tokenizer, rows, folder / "run")
    here = make_trainer(*common, reference_models=models, score_cache_dir="scores", max_length=1024)
    there = make_trainer(*common, reference_score_file="scores.parquet", max_length=1024, packing=True)
    assert there._reference_names == here._reference_names == ["llama_3", "zephyr"]
    assert sum(map(len, there.train_dataset["reference_log_prob_1"])) == sum(
        map(len, here.train_dataset["reference_log_prob_1"])
    )

    # The rows that are kept are the best in the mean over both models
    kept = load_dataset("kept", split="train")
    means = [sum(values) for values in here.train_dataset["reference_log_probs"]]
    best = sorted(range(12), key=lambda row: -means[row])[:3]
    assert list(kept["completion"]) == [rows["completion"][row] for row in sorted(best)]
    table = pq.read_table("scores.parquet")
    assert len(table) == 2 * 15 and keys_of_best(table, 1.0) == set(add_content_keys(rows)["example_key"])


@pytest.mark.parametrize("packing", ["false", "true"])
def test_keeps_rows_of_tokens(packing, folder, token_rows, tiny_model, tokenizer, capsys):
    """Without labels, too, of which the trainer makes its own."""
    tiny_model.save_pretrained("reference")
    tokenizer.save_pretrained("reference")
    for split in ("train", "test"):
        token_rows.remove_columns("labels").add_column("row", range(16)).to_json(f"data/{split}.jsonl")
    keep = ["--keep-top", "0.25", "--kept", "kept.jsonl", "--packing", packing]
    assert main(["score", "--config", "recipe.yaml", "--reference_models", "reference", *keep]) == 0
    assert "wrote kept.jsonl: the best 4 of 16 rows" in capsys.readouterr().out

    common = (PoFTTrainer, PoFTConfig, tiny_model, tokenizer, load_dataset("data", split="train"), folder / "run")
    prepared = make_trainer(*common, reference_models="reference", score_cache_dir="scores").train_dataset
    best = sorted(range(16), key=lambda row: -prepared["reference_log_prob_0"][row][0])[:4]
    assert load_dataset("json", data_files="kept.jsonl", split="train")["row"] == sorted(best)


def test_bad_input(folder, capsys):
    assert main(["score", "--config", "recipe.yaml", "--keep-top", "0.5"]) == 2
    assert "`--keep-top` and `--kept` must both be given, or neither, got 0.5 and None" in capsys.readouterr().err
    uniform = ["--preference_weighting", "uniform", "--output", "scores.parquet"]
    assert main(["score", "--config", "recipe.yaml", *uniform]) == 2
    message = "`--output` is 'scores.parquet', but recipe.yaml does not score with reference models"
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["score", "--config", "recipe.yaml", "--keep-top", "1.5", "--kept", "a.jsonl"])
    assert "1.5 is not between 0 and 1" in capsys.readouterr().err
    assert main(["score", "--config", "recipe.yaml", "--reference_models", "nowhere"]) == 2
    assert "The tokenizer of the reference model 'nowhere' can't be loaded" in capsys.readouterr().err


def test_a_recipe_without_reference_models_is_prepared(folder, capsys):
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["module"] = "hf_sft_variants.sft_go"
    del recipe["reference_models"]
    Path("sft_go.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert main(["score", "--config", "sft_go.yaml"]) == 0
    assert capsys.readouterr().out == "prepared sft_go.yaml: 12 training rows\n"


@pytest.mark.distributed
def test_two_processes_that_are_killed_go_on(folder, other_process):
    """Killed in the second of two models: only what is missing is scored, and the files are those of one process."""
    command = ["score", "--config", "recipe.yaml", "--reference_batch_tokens", "100"]
    on_two = json.dumps([*command, "--score_cache_dir", "shared"])
    assert other_process.run(score, folder, on_two, 9, forks=2) == -signal.SIGKILL
    unfinished, finished = sorted(map(len, scores_in(Path("shared")).values()))
    assert finished == 12 and 0 < unfinished < 12
    for path in Path().glob("batches_of_process_*"):
        path.unlink()
    assert other_process.run(score, folder, on_two, 0, forks=2) == 0
    printed = "".join(path.read_text() for path in Path().glob("printed_by_process_*"))
    assert printed.count("zephyr on the train dataset") == 1
    batches = [int(size) for path in Path().glob("batches_of_process_*") for size in path.read_text().split()]
    assert sum(batches) == 12 - unfinished

    assert main(command) == 0
    ones, twos = scores_in(Path("scores")), scores_in(Path("shared"))
    assert ones.keys() == twos.keys() and len(ones) == 2
    for name, scores in twos.items():
        assert scores.keys() == ones[name].keys()
        for key, row in scores.items():
            assert row == pytest.approx(ones[name][key], rel=1e-6)
