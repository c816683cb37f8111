import traceback

import pytest
import yaml

from hf_sft_variants.comparison import run, runs


RECIPE = {
    "num_processes": 1,
    "model_name_or_path": "model",
    "output_dir": "elsewhere",
    "max_length": 64,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
# Two arms with every required key
STUDY = {
    "output_dir": "study",
    "seeds": [0, 1],
    "baseline": "sft",
    "data": {"sums": {"dataset_name": "data"}},
    "arms": {"sft": {"recipe": "sft.yaml"}, "sft_go": {"recipe": "sft_go.yaml"}},
    "budget": {"steps": 2},
    "evaluations": {"max_new_tokens": 4},
}


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_model, tokenizer, chat_rows):
    """A working directory with a tiny model, a little data, and recipes of three methods."""
    monkeypatch.chdir(tmp_path)
    tiny_model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    answers = [row["completion"][0]["content"].split()[-1] for row in chat_rows]
    rows = chat_rows.add_column("answer", answers)
    rows.select(range(8)).to_json("data/train.jsonl")
    rows.select(range(8, 12)).to_json("data/test.jsonl")
    for name in ("sft", "sft_go", "poft"):
        module = {} if name == "sft" else {"module": f"hf_sft_variants.{name}"}
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump({"num_processes": 1, **module, **RECIPE}, sort_keys=False)
        )
    return tmp_path


@pytest.fixture
def write_study(folder):
    """Writes [`STUDY`] with other values of its keys; `None` leaves a key out."""

    def write(**changes):
        study = {key: value for key, value in {**STUDY, **changes}.items() if value is not None}
        (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        return "study.yaml"

    return write


class RunInThisProcess:
    """Replaces the process of a run, whose imports would take ten times as long as the training."""

    def __init__(self, folder, device=None):
        self.folder, self.device = folder, device

    def wait(self):
        try:
            run.do_run(self.folder)
        except Exception:  # whatever it is, a process would write it to its log and end with 1
            (self.folder / "log.txt").write_text(traceback.format_exc())
            return 1
        return 0

    def kill(self):
        pass


@pytest.fixture
def in_this_process(monkeypatch):
    """Makes runs start in this process; returns their folders in order."""
    started = []

    def start(folder, device=None):
        started.append(str(folder))
        return RunInThisProcess(folder, device)

    monkeypatch.setattr(runs, "start_process", start)
    return started
