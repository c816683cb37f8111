"""`report_to`: all metrics and settings of a method arrive in TensorBoard, W&B and trackio, under sensible names."""

import json
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import make_trainer
from transformers import BitsAndBytesConfig
from transformers.integrations.integration_utils import rewrite_logs
from trl import SFTConfig

import hf_sft_variants


PAGES = Path(__file__).parents[1] / "docs" / "methods"
NAMES = {"sft_go": "SFTGO", "sftkey": "SFTKey", "poft": "PoFT", "sftmix": "SFTMix"}

# All that a method logs: another grouping has other metrics
RUNS = {
    "sft_go": {"min_grouped_tokens": 2},
    "sft_go, own groups": {"group_by": "column", "group_column": "groups"},
    "sftkey": {
        "key_pattern": r"#### (?P<key>.+)",
        "answer_eval_steps": 3,
        "answer_eval_max_new_tokens": 2,
        "eval_strategy": "epoch",
    },
    "poft": {"reference_model_init_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}},
    "sftmix": {"confidence_split": "random"},
}


def train(run, model, tokenizer, chat_rows, folder, trackers):
    """Two epochs, each evaluated, without a card, which TRL would write with links to the real trackers."""
    method = run.partition(",")[0]
    if run == "sft_go, own groups":
        rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "groups": [0, 0, 1, 1]}] * 12)
    else:
        answers = [row[0]["content"].rpartition("#### ")[2] for row in chat_rows["completion"]]
        rows = chat_rows.add_column("ref_logps", [[-2.0, -3.0]] * 12).add_column("answer", answers)
    classes = [getattr(hf_sft_variants, NAMES[method] + part) for part in ("Trainer", "Config")]
    options = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "eval_strategy": "epoch",
        "eval_dataset": rows,
        "save_strategy": "no",
        "report_to": trackers,
        **RUNS[run],
    }
    trainer = make_trainer(*classes, model, tokenizer, rows, folder, **options)
    trainer.train()
    return trainer


def own_settings(trainer):
    return {k: v for k, v in trainer.args.to_dict().items() if k not in SFTConfig.__dataclass_fields__}


def documented(method: str) -> list[str]:
    """Names in the table of the method's page, as patterns of what a tracker shows."""
    section = (PAGES / f"{method}.md").read_text().partition("## Reading the metrics")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall(r"`([\w/<>]+)`", cell)]
    return [re.sub(r"<\w+>", r"\\w+", next(iter(rewrite_logs({name: 0})))) for name in names]


class Config(dict):
    def update(self, values, allow_val_change):
        super().update(values)


class StandIn(ModuleType):
    """Records what the callbacks of `transformers` send to W&B and to trackio, which is the same but for the start."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.config, self.logs, self.run = Config(), [], None
        self.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))

    def init(self, **options):
        self.run = SimpleNamespace(summary={}, _label=lambda **options: None)

    def define_metric(self, *args, **options):
        """Says what stands on the horizontal axis."""

    def log(self, metrics):
        self.logs.append(dict(metrics))

    def finish(self):
        self.run = None


@pytest.fixture
def stand_ins(monkeypatch):
    stand_ins = {name: StandIn(name) for name in ("wandb", "trackio")}
    errors = ModuleType("wandb.sdk.lib.config_util")
    errors.ConfigError = RuntimeError
    modules = {**stand_ins, **{name: ModuleType(name) for name in ("wandb.sdk", "wandb.sdk.lib")}}
    for name, module in {**modules, errors.__name__: errors}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return stand_ins


@pytest.mark.parametrize("run", RUNS)
def test_names_and_settings(run, stand_ins, tiny_model, tokenizer, chat_rows, tmp_path):
    method = run.partition(",")[0]
    trainer = train(run, tiny_model, tokenizer, chat_rows, tmp_path, list(stand_ins))
    for tracker in stand_ins.values():
        sent = {name: value for log in tracker.logs for name, value in log.items()}
        assert all(isinstance(value, int | float) for value in sent.values())
        own = [name for name in sent if f"{method}/" in name]
        assert own and all(name.startswith((f"train/{method}/", f"eval/{method}/")) for name in own)
        # What is measured in both has the same name in both
        evaluated = [name.removeprefix("eval/") for name in own if name.startswith("eval/")]
        assert {f"train/{name}" for name in evaluated} <= sent.keys() and bool(evaluated) == (method != "sftmix")
        assert {"train/nll", "eval/nll", "train/loss", "eval/loss"} <= sent.keys()
        settings = own_settings(trainer)
        assert settings and {name: tracker.config[name] for name in settings} == settings
        json.dumps(settings)


@pytest.mark.parametrize("method", NAMES)
def test_everything_documented_arrives(method, stand_ins, tiny_model, tokenizer, chat_rows, tmp_path):
    for run in [run for run in RUNS if run.partition(",")[0] == method]:
        train(run, tiny_model, tokenizer, chat_rows, tmp_path, ["wandb"])
    sent = {name for log in stand_ins["wandb"].logs for name in log}
    missing = [pattern for pattern in documented(method) if not any(re.fullmatch(pattern, name) for name in sent)]
    assert len(documented(method)) > 5 and not missing


@pytest.mark.parametrize("method", NAMES)
def test_tensorboard(method, tiny_model, tokenizer, chat_rows, tmp_path, monkeypatch):
    """What it can't draw it drops with a warning: here all is in its file, with the values that were logged."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = train(method, tiny_model, tokenizer, chat_rows, tmp_path, ["tensorboard"])
    events = event_accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    logged = {}
    for log in trainer.state.log_history:
        for name, value in rewrite_logs({name: value for name, value in log.items() if name != "step"}).items():
            logged.setdefault(name, []).append((log["step"], value))
    drawn = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert drawn.keys() == logged.keys()
    for name, values in logged.items():
        torch.testing.assert_close(torch.tensor(drawn[name]), torch.tensor(values), msg=name)
    (text,) = events.Tensors("args/text_summary")
    settings = json.loads(text.tensor_proto.string_val[0])
    assert {name: settings[name] for name in own_settings(trainer)} == own_settings(trainer)
