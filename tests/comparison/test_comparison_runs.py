"""Each run is trained once, even if the study is stopped; a resumed study equals an uninterrupted one."""

import json
import os
import signal
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from filelock import FileLock

from hf_sft_variants.cli import main as cli
from hf_sft_variants.comparison import plan_runs, read_study, run, runs
from hf_sft_variants.comparison.machine import peak_memory
from hf_sft_variants.evaluation import exact_match, held_out_nll
from hf_sft_variants.launch.loading import load_model_and_tokenizer, load_split


SFT, SFT_GO = {"recipe": "sft.yaml"}, {"recipe": "sft_go.yaml"}
POFT = {"recipe": "poft.yaml", "overrides": {"reference_models": ["model", "{runs}/sft/seed_{seed}"]}}

# Trains like SFTTrainer, but the first time it kills its study after a step
STOPPED_ONCE = """
import os, signal, threading
from filelock import FileLock
from trl import SFTTrainer

class StoppedOnceTrainer(SFTTrainer):
    def training_step(self, *args):
        if self.state.global_step == 1 and not os.path.exists("stopped"):
            open("stopped", "w").close()
            self.lock = FileLock("alive.lock")  # held as long as this process is alive
            self.lock.acquire()
            os.kill(os.getppid(), signal.SIGKILL)
            threading.Event().wait()
        return super().training_step(*args)
"""


def read_results(folder="study"):
    return json.loads(Path(folder, "results.json").read_text())


def without_costs(results):
    """Results without the figures that differ from run to run."""
    for result in results["runs"]:
        for name in ("seconds", "seconds_before_training", "peak_memory_bytes"):
            assert result.pop(name) > 0
        for log in result["log_history"]:
            for name in [name for name in log if name.endswith(("_runtime", "_per_second"))]:
                del log[name]
    return results


def ids_of_files(folder, name):
    """Inode of each file: a rewritten file has another."""
    return {path: path.stat().st_ino for path in Path(folder).rglob(name)}


def test_a_study_from_its_start_to_its_end(write_study, in_this_process, capsys):
    longer = {**SFT, "budget": {"steps_of": "poft"}}
    path = write_study(seeds=[0], arms={"longer": longer, "poft": {**POFT, "budget": {"steps": 3}}, "sft": SFT})
    assert cli(["compare", "--config", path]) == 0
    assert "wrote study/results.json and study/report.html" in capsys.readouterr().out
    assert in_this_process == [f"study/runs/sums/{arm}/seed_0" for arm in ("sft", "poft", "longer")]
    results = read_results()
    assert results["missing"] == [] and results["study"]["budget"] == {"steps": 2}
    assert {result["arm"]: result["steps"] for result in results["runs"]} == {"sft": 2, "poft": 3, "longer": 3}
    by_arm = {result["arm"]: result for result in results["runs"]}
    assert by_arm["poft"]["seconds"] > by_arm["poft"]["seconds_before_training"] > 0
    assert by_arm["longer"]["tokens"] == max(log.get("num_tokens", 0) for log in by_arm["longer"]["log_history"])
    assert list(Path("study/runs/sums/poft/seed_0/scores").glob("*/*.parquet"))
    assert yaml.safe_load(Path("study/runs/sums/longer/seed_0/recipe.yaml").read_text())["max_steps"] == 3

    model, tokenizer = load_model_and_tokenizer("study/runs/sums/poft/seed_0", device="cpu")
    rows = load_split("data", "test")
    share, texts = exact_match(model, tokenizer, rows, 4)
    evaluations = by_arm["poft"]["evaluations"]
    assert evaluations["nll"]["mean"] == held_out_nll(model, tokenizer, rows)
    assert (evaluations["accuracy"]["mean"], len(evaluations["accuracy"]["rows"])) == (share, 4)
    assert [sample["generation"] for sample in by_arm["poft"]["generations"]] == texts

    trained, in_this_process[:] = ids_of_files("study", "training.json"), []
    assert cli(["compare", "--config", path]) == 0 and in_this_process == []
    changed = {"max_new_tokens": None}
    path = write_study(
        seeds=[0],
        arms=yaml.safe_load(Path(path).read_text())["arms"] | {"poft": {**POFT, "budget": {"steps": 3}}},
        evaluations=changed,
    )
    assert cli(["compare", "--config", path]) == 0 and len(in_this_process) == 3
    assert ids_of_files("study", "training.json") == trained
    assert list(read_results()["runs"][0]["evaluations"]) == ["nll"]


def test_a_run_that_fails_stops_no_other(write_study, in_this_process, capsys, folder):
    broken = {"recipe": "poft.yaml", "overrides": {"reference_models": ["nowhere"]}}
    needs = {**SFT, "budget": {"steps_of": "broken"}}
    path = write_study(seeds=[0], arms={"broken": broken, "needs": needs, "sft": SFT})
    assert cli(["compare", "--config", path]) == 1
    printed = capsys.readouterr().err
    assert "broken on sums, seed 0 failed: exit status 1" in printed and "'nowhere'" in printed
    assert "needs on sums, seed 0 failed: a run that it needs has failed" in printed
    results = read_results()
    assert [result["arm"] for result in results["runs"]] == ["sft"]
    assert [(missing["arm"], bool(missing["error"])) for missing in results["missing"]] == [
        ("broken", True),
        ("needs", True),
    ]

    (folder / "nowhere").symlink_to("model")
    assert cli(["compare", "--config", path]) == 0
    assert in_this_process[2:] == ["study/runs/sums/broken/seed_0", "study/runs/sums/needs/seed_0"]


def test_only_the_process_of_a_run_does_without_a_cache(folder, write_study, in_this_process, monkeypatch):
    assert cli(["compare", "--config", write_study(seeds=[0], arms={"sft": SFT})]) == 0
    assert datasets.is_caching_enabled()
    seen = []
    monkeypatch.setattr(run, "_end_with_parent", lambda: None)
    monkeypatch.setattr(run, "do_run", lambda folder: seen.append(datasets.is_caching_enabled()))
    run.main(["folder"])
    datasets.enable_caching()
    assert seen == [False]


def run_study(folder, path):
    os.chdir(folder)
    os.environ["PYTHONPATH"] += f":{folder}"  # for the process of each run
    cli(["compare", "--config", path])


def test_a_killed_study_goes_on_to_the_same_results(write_study, in_this_process, folder, other_process):
    (folder / "stopped_once.py").write_text(STOPPED_ONCE)
    recipe = yaml.safe_load((folder / "sft_go.yaml").read_text())
    (folder / "stopped_once.yaml").write_text(yaml.safe_dump({**recipe, "module": "stopped_once"}, sort_keys=False))
    changes = {"seeds": [0], "overrides": {"use_peft": True}, "budget": {"tokens": 300}}
    assert cli(["compare", "--config", write_study(**changes, arms={"sft": SFT})]) == 0
    arms = {"sft": SFT, "stopped": {"recipe": "stopped_once.yaml"}, "sft_go": SFT_GO}
    path, in_this_process[:] = write_study(**changes, arms=arms), []
    assert other_process.run(run_study, folder, path) == -signal.SIGKILL
    with FileLock("alive.lock", timeout=60):  # the run's process has noticed, and is gone, too
        pass
    results = read_results()
    assert [result["arm"] for result in results["runs"]] == ["sft"] and len(results["missing"]) == 2
    assert not Path("study/runs/sums/stopped/seed_0/training.json").exists()
    (trained,) = ids_of_files("study", "training.json").items()

    assert cli(["compare", "--config", path]) == 0
    assert in_this_process == ["study/runs/sums/stopped/seed_0", "study/runs/sums/sft_go/seed_0"]
    assert trained in ids_of_files("study", "training.json").items()
    Path("study").rename("resumed")
    assert cli(["compare", "--config", path]) == 0
    assert without_costs(read_results("resumed")) == without_costs(read_results("study"))


def test_devices_are_shared_out(write_study, monkeypatch, in_this_process):
    """Each run has its own device, and a free device takes the next run."""
    seen = []

    class Process:
        def __init__(self, folder, device):
            seen.append(device)

        def wait(self):
            return 1

        def kill(self):
            pass

    monkeypatch.setattr(runs, "start_process", Process)
    monkeypatch.setattr(runs, "last_lines", lambda folder: "")
    runs.do_missing_runs(plan_runs(read_study(write_study())), ["3", "5"], lambda failures: None)
    assert sorted(seen[:2]) == ["3", "5"] and set(seen) == {"3", "5"} and len(seen) == 4


@pytest.mark.parametrize("visible, device, seen", [(None, "1", "1"), ("4,6", "1", "6"), ("4,6", None, "4,6")])
def test_a_device_is_one_of_those_that_are_visible(monkeypatch, tmp_path, visible, device, seen):
    environments = []
    monkeypatch.setattr(runs.subprocess, "Popen", lambda *args, env, **kwargs: environments.append(env))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    runs.start_process(tmp_path, device)
    assert environments[0]["CUDA_VISIBLE_DEVICES"] == seen


def test_interrupted(write_study, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_sft_variants.comparison.runs.do_missing_runs", interrupt)
    assert cli(["compare", "--config", write_study()]) == 130
    assert "stopped; the same command continues" in capsys.readouterr().err


def test_logs_that_are_not_numbers():
    assert run._without_infinities({"loss": float("nan"), "step": 1, "grad_norm": float("inf"), "nll": 0.5}) == {
        "loss": None,
        "step": 1,
        "grad_norm": None,
        "nll": 0.5,
    }


def test_a_study_that_is_being_run_is_refused(write_study, capsys):
    path = write_study()
    Path("study").mkdir()
    with FileLock("study/.lock"):
        assert cli(["compare", "--config", path]) == 2
    assert "`output_dir` study is in use: this study is running already" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read elsewhere on this system")
def test_peak_memory_is_that_of_the_process():
    held = bytearray(os.urandom(1)) * 2**28
    peak = peak_memory(torch.device("cpu"))
    assert peak["memory_kind"] == "resident on the CPU"
    assert len(held) < peak["peak_memory_bytes"] < 2**36
