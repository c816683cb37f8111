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
from methods import METHODS, with_references
from tensorboard.backend.event_processing import event_accumulator
from transformers import BitsAndBytesConfig
from transformers.integrations.integration_utils import rewrite_logs
from trl import SFTConfig


PAGES = Path(__file__).parents[1] / "docs" / "methods"

# Together they log every metric of a method: another grouping has other metrics
RUNS = {
    "sft_go": [{"min_grouped_tokens": 2}, {"group_by": "column", "group_column": "groups"}],
    "sftkey": [
        {
            "key_pattern": r"#### (?P<key>.+)",
            "answer_eval_steps": 3,
            "answer_eval_max_new_tokens": 2,
            "eval_strategy": "epoch",
        }
    ],
    "poft": [{"reference_model_init_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}}],
    "sftmix": [{"confidence_split": "random"}],
}


def train(method, options, model, tokenizer, chat_rows, folder, trackers):
    """Two epochs, each evaluated, without a model card, which TRL would write with links to the real trackers."""
    if "group_column" in options:
        rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "groups": [0, 0, 1, 1]}] * 12)
    else:
        answers = [row[0]["content"].rpartition("#### ")[2] for row in chat_rows["completion"]]
        rows = with_references(chat_rows).add_column("answer", answers)
    options = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "eval_strategy": "epoch",
        "eval_dataset": rows,
        "save_strategy": "no",
        "report_to": trackers,
        **options,
    }
    trainer = make_trainer(*METHODS[method].classes, model, tokenizer, rows, folder, **options)
    trainer.train()
    return trainer


def own_settings(trainer):
    return {k: v for k, v in trainer.args.to_dict().items() if k not in SFTConfig.__dataclass_fields__}


def as_patterns(names):
    return [re.sub(r"<\w+>", r"\\w+", next(iter(rewrite_logs({name: 0})))) for name in names]


def documented(method: str) -> tuple[list[str], list[str]]:
    """Names in the table of the method's page, and on the whole page, as patterns of a tracker's names."""
    page = (PAGES / f"{method}.md").read_text()
    section = page.partition("## Reading the metrics")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    in_table = [name for cell in cells for name in re.findall(r"`([\w/<>]+)`", cell)]
    return as_patterns(in_table), as_patterns(re.findall(rf"`(?:eval_)?({method}/[\w<>]+)`", page))


class Config(dict):
    def update(self, values, allow_val_change):
        super().update(values)


class StandIn(ModuleType):
    """Records what the callbacks of `transformers` send to W&B and to trackio, which has nearly the same interface."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.config, self.logs, self.run = Config(), [], None
        self.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))

    def init(self, **options):
        self.run = SimpleNamespace(summary={}, _label=lambda **options: None)

    def define_metric(self, *args, **options):
        """Names the horizontal axis."""

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


@pytest.mark.parametrize("method", [method for method in RUNS if method in METHODS])
def test_names_and_settings(method, stand_ins, tiny_model, tokenizer, chat_rows, tmp_path, monkeypatch):
    trackers = [*stand_ins, "tensorboard"]
    for number, options in enumerate(RUNS[method]):
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / f"events_{number}"))
        trainer = train(method, options, tiny_model, tokenizer, chat_rows, tmp_path / "run", trackers)
        assert_in_tensorboard(trainer, tmp_path / f"events_{number}")
        for tracker in stand_ins.values():
            settings = own_settings(trainer)
            assert settings and {name: tracker.config[name] for name in settings} == settings
            json.dumps(settings)
    in_table, on_page = documented(method)
    for tracker in stand_ins.values():
        sent = {name: value for log in tracker.logs for name, value in log.items()}
        assert all(isinstance(value, int | float) for value in sent.values())
        own = [name for name in sent if f"{method}/" in name]
        assert own and all(name.startswith((f"train/{method}/", f"eval/{method}/")) for name in own)
        # Measured in both, a metric has the same name in both
        evaluated = [name.removeprefix("eval/") for name in own if name.startswith("eval/")]
        assert {f"train/{name}" for name in evaluated} <= sent.keys() and bool(evaluated) == (method != "sftmix")
        assert {"train/nll", "eval/nll", "train/loss", "eval/loss"} <= sent.keys()
        # Everything in the page's table arrives, and everything that arrives is on the page
        assert len(in_table) > 5 and all(any(re.fullmatch(pattern, name) for name in sent) for pattern in in_table)
        for name in own:
            assert any(re.fullmatch(pattern, name.replace("eval/", "train/")) for pattern in on_page), name


def assert_in_tensorboard(trainer, folder):
    """TensorBoard drops with a warning what it can't draw: its file has every value that was logged."""
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
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
