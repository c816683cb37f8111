"""Every arm of the repository's studies can be trained, on the right rows; here on a few rows of the data."""

import json
import re
import runpy
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

from hf_sft_variants.cli import main
from hf_sft_variants.comparison import plan_runs, read_study
from hf_sft_variants.launch import training
from hf_sft_variants.launch.parsing import parse_recipe
from hf_sft_variants.quickstart import build_splits, write_data


ROOT = Path(__file__).parents[2]
STUDIES = sorted(path.stem for path in ROOT.glob("studies/*.yaml"))
# Options of benchmarks/study_data.py, by the study whose data they make
DATA_OPTIONS = dict(re.findall(r"^DATA_(\w+) = (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, tiny_model_factory, tokenizer) -> Path:
    """The repository's recipes and studies, with a small model and little data."""
    folder = tmp_path_factory.mktemp("studies")
    for name in ("recipes", "studies"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("data", "small", "small_data", "full*", "runs")
        )
    for path in folder.glob("studies/*.yaml"):
        path.write_text(
            path.read_text().replace("use_cpu: false", "use_cpu: true").replace("bf16: true", "bf16: false")
        )
    tiny_model_factory().save_pretrained(folder / "quickstart" / "model")
    tokenizer.save_pretrained(folder / "quickstart" / "model")
    write_data(folder / "quickstart" / "data", build_splits(train_size=8, test_size=4))
    (folder / "gsm8k").mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"{split} {i}?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(60)]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = ["--train_size", "8", "--validation_size", "2", "--test_size", "4"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for output, options in all_data_options():
            monkeypatch.setattr(sys, "argv", ["study_data.py", *options, *sizes, "--output", f"studies/{output}"])
            runpy.run_path(str(ROOT / "benchmarks" / "study_data.py"), run_name="__main__")
        likely_rows_of_poft()
    for path in list((folder / "studies" / "data").rglob("chain_sum*")):
        path.with_name(path.name.replace("chain_sum", "chitchat")).symlink_to(path)
    return folder


def likely_rows_of_poft() -> None:
    """What `make study-poft` does before the study, with an untrained reference model."""
    for seed in range(5):
        reference = f"studies/runs/poft_references/runs/clean/reference/seed_{seed}"
        shutil.copytree("quickstart/model", reference)
        words = ["score", "--config", "recipes/quickstart/poft.yaml", "--score_cache_dir", "scores"]
        words += ["--dataset_name", "studies/data/poft/chain_sum_noisy", "--reference_models", reference]
        kept = f"studies/data/poft/likely_rows_{seed}/train.jsonl"
        assert main([*words, "--keep-top", "0.6667", "--kept", kept]) == 0


def all_data_options() -> list[tuple[str, list[str]]]:
    """Folders of data with the options that make it, where dialogues, which a package has, are sums."""
    options = [("data", ["--tasks", "chain_sum", "gsm_symbolic"]), ("small_data", ["--tasks", "chain_sum"])]
    for study, text in DATA_OPTIONS.items():
        words = ["--corrupted", "0.3333", *text.replace("$(GSM8K)", "gsm8k").replace("chitchat", "chain_sum").split()]
        options += [(f"data/{study}", words), (f"data/{study}_pilot", [*words, "--pilot"])]
    return options


@pytest.mark.parametrize("name", [name for name in STUDIES if name.endswith("_pilot")])
def test_pilots_have_seeds_of_their_own(name, checkout, monkeypatch):
    """Their arms, which differ in numbers only, are parsed."""
    monkeypatch.chdir(checkout)
    pilot, study = (read_study(f"studies/{stem}.yaml") for stem in (name, name.removesuffix("_pilot")))
    assert plan_runs(pilot) and not {*pilot.seeds} & {*study.seeds}


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", [name for name in STUDIES if not name.endswith("_pilot")])
def test_every_arm_can_be_trained_on_the_rows_of_sft(name, checkout, monkeypatch, tmp_path):
    shutil.copytree(checkout, tmp_path / "checkout", symlinks=True)
    monkeypatch.chdir(tmp_path / "checkout")
    monkeypatch.setattr(training, "load_dataset", cache(training.load_dataset))  # most arms have the same data
    study = read_study(f"studies/{name}.yaml")
    shutil.rmtree(study.output_dir, ignore_errors=True)
    runs = plan_runs(study)
    data = next(iter(study.data))
    assert {run.seed for run in runs} == set(study.seeds) and len({run.arm for run in runs}) == len(study.arms)
    prepared = {}
    for run in [run for run in runs if (run.data, run.seed) == (data, study.seeds[0])]:
        for other in run.others:
            shutil.copytree("quickstart/model", other, dirs_exist_ok=True)
        # The former needs a classifier that is on the Hub, the latter a file that the training of another arm writes
        if run.recipe.get("group_by") != "llmlingua2" and "confidence_file" not in run.recipe:
            trainer_class, arguments = parse_recipe(run.recipe)
            trainer = training.build_trainer(trainer_class, *arguments)
            prepared[run.arm] = trainer.train_dataset.select_columns(["input_ids", "labels"])[:]
    baseline = prepared.pop(study.baseline)
    assert len(baseline["input_ids"]) == 8 and -100 in baseline["labels"][0]
    for arm, rows in prepared.items():
        if arm == "reference":
            assert len(rows["input_ids"]) == 8 and not any(ids in baseline["input_ids"] for ids in rows["input_ids"])
        elif arm == "sft_on_all_rows":
            assert len(rows["input_ids"]) == 16 and rows["input_ids"][:8] == baseline["input_ids"]
        elif arm == "sft_on_likely_rows":
            assert len(rows["input_ids"]) == 5 and all(ids in baseline["input_ids"] for ids in rows["input_ids"])
        elif arm == "sft_random_mask":
            assert rows["input_ids"] == baseline["input_ids"]
            pairs = zip(rows["labels"], baseline["labels"], strict=True)
            assert all(labels.count(-100) > before.count(-100) for labels, before in pairs)
        else:
            assert rows == baseline, arm
