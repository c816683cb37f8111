"""Every arm of the repository's studies can be trained, on the right rows; here on a few rows of the data."""

import runpy
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

from hf_sft_variants.comparison import plan_runs, read_study
from hf_sft_variants.launch import training
from hf_sft_variants.launch.parsing import parse_recipe
from hf_sft_variants.quickstart import build_splits, write_data


ROOT = Path(__file__).parents[2]
STUDIES = sorted(path.stem for path in ROOT.glob("studies/*.yaml"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, tiny_model_factory, tokenizer) -> Path:
    """The repository's recipes and studies, with a small model and little data."""
    folder = tmp_path_factory.mktemp("studies")
    for name in ("recipes", "studies"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("data", "small", "small_data", "full*")
        )
    for path in folder.glob("studies/*.yaml"):
        path.write_text(
            path.read_text().replace("use_cpu: false", "use_cpu: true").replace("bf16: true", "bf16: false")
        )
    tiny_model_factory().save_pretrained(folder / "quickstart" / "model")
    tokenizer.save_pretrained(folder / "quickstart" / "model")
    write_data(folder / "quickstart" / "data", build_splits(train_size=8, test_size=4))
    sizes = ["--train_size", "8", "--validation_size", "2", "--test_size", "4"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for output, tasks in (("studies/data", ["chain_sum", "gsm_symbolic"]), ("studies/small_data", ["chain_sum"])):
            monkeypatch.setattr(sys, "argv", ["study_data.py", *sizes, "--tasks", *tasks, "--output", output])
            runpy.run_path(str(ROOT / "benchmarks" / "study_data.py"), run_name="__main__")
    for path in list((folder / "studies" / "data").glob("chain_sum*")):  # in place of dialogues, which a package has
        path.with_name(path.name.replace("chain_sum", "chitchat")).symlink_to(path)
    return folder


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_can_be_trained_on_the_rows_of_sft(name, checkout, monkeypatch, tmp_path):
    shutil.copytree(checkout, tmp_path / "checkout", symlinks=True)
    monkeypatch.chdir(tmp_path / "checkout")
    monkeypatch.setattr(training, "load_dataset", cache(training.load_dataset))  # most arms have the same data
    study = read_study(f"studies/{name}.yaml")
    runs = plan_runs(study)
    data = next(iter(study.data))
    assert {run.seed for run in runs} == set(study.seeds) and len({run.arm for run in runs}) == len(study.arms)
    prepared = {}
    for run in [run for run in runs if (run.data, run.seed) == (data, study.seeds[0])]:
        for other in run.others:
            shutil.copytree("quickstart/model", other, dirs_exist_ok=True)
        if run.recipe.get("group_by") != "llmlingua2":  # its classifier is on the Hub
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
        else:
            assert rows == baseline, arm
