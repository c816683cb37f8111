"""A killed run resumes from its last checkpoint as if nothing had happened."""

import json
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from datasets import Dataset
from helpers import SMALL
from methods import METHODS, with_references
from peft import LoraConfig
from transformers import TrainerCallback


# Twelve rows: three steps in an epoch, six in a run, two micro-batches in each
RUN = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_length": 64,
    "disable_tqdm": True,
}

# The calls that a process counts until it is killed
MOMENTS = {
    "step": "trl.SFTTrainer.training_step",  # of a micro-batch
    "save": "transformers.Trainer._save_optimizer_and_scheduler",  # the weights are on disk already
    "score": "hf_sft_variants.scoring.LogProbScorer.__call__",  # of a batch
    # Of a checkpoint of SFTMix's reference; the last one is of all
    "measure": "hf_sft_variants.sftmix.confidence.write_parquet",
}


@dataclass
class Run:
    """A configuration and its phases: the call that is counted, and the range from which the fatal one is drawn."""

    method: str
    options: dict
    phases: dict[str, tuple[str, int, int]]
    lora: bool = False
    scored: bool = False  # whether the rows have the reference models' scores

    def last_number(self, phase: str) -> int:
        """The call at which the process is killed: random, but the same each time."""
        _, first, last = self.phases[phase]
        return random.Random(f"{self.method} {phase}").randint(first, last)


RUNS = {
    "base": Run("base", {}, {"training": ("step", 3, 12), "saving": ("save", 2, 6)}),
    "schedule": Run(
        "sft_go",
        {"min_grouped_tokens": 2, "worst_group_schedule": "cosine", "packing": True, "max_length": 60},
        {"moving λ": ("step", 3, 12)},
    ),
    "rho1": Run(
        "sft_go",
        {"group_by": "rho1", "reference_model": "MODEL", "min_grouped_tokens": 2, "score_batch_tokens": 64},
        {"scoring": ("score", 2, 8), "training": ("step", 3, 12)},
        lora=True,
    ),
    "stages": Run(
        "sftkey",
        {"key_delimiter": "####"},
        {"first stage": ("step", 3, 6), "boundary": ("step", 7, 8), "second stage": ("step", 9, 12)},
    ),
    "references": Run(
        "poft",
        {"reference_models": ["MODEL"], "reference_batch_tokens": 64},
        {"scoring": ("score", 2, 8), "training": ("step", 3, 12)},
    ),
    "own_scores": Run("poft", {"beta": 2.0}, {"training": ("step", 3, 12)}, lora=True, scored=True),
    "two_phases": Run(
        "sftmix",
        {},
        {
            "reference": ("step", 3, 12),
            "confidence at a checkpoint": ("measure", 1, 3),
            "confidence of all": ("measure", 4, 4),
            "between": ("step", 13, 14),
            "mixup": ("step", 15, 24),
        },
    ),
    "online": Run(
        "sftmix",
        {"confidence_source": "online"},
        {"first epoch": ("step", 3, 6), "mixup": ("step", 7, 12)},
    ),
}


def make_trainer(name: str, folder: Path, output_dir: Path, **options):
    """The trainer of a run, made alike by each process; `folder` has the model and the rows."""
    run, model = RUNS[name], str(folder / "model")
    method = METHODS[run.method]
    own = json.loads(json.dumps(run.options).replace('"MODEL"', json.dumps(model)))
    if {"reference_model", "reference_models"} & own.keys():
        own["score_cache_dir"] = str(output_dir / "scores")
    rows = Dataset.from_json(str(folder / "rows.jsonl"), cache_dir=str(output_dir / "cache"))
    return method.trainer_class(
        model,
        method.config_class(str(output_dir), **{**SMALL, **RUN, **own, **options}),
        train_dataset=rows if run.scored else rows.remove_columns("ref_logps"),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2) if run.lora else None,
    )


PHASES = [
    pytest.param(run.method, name, phase, id=f"{name}-{phase}")
    for name, run in RUNS.items()
    if run.method in METHODS
    for phase in run.phases
]


def kill_at(moment: str, number: int) -> None:
    """Kill this process at its `number`-th call."""
    path, _, name = MOMENTS[moment].rpartition(".")
    owner, calls = resolve_name(path), []
    function = getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def train_until_killed(name: str, phase: str, folder: str) -> None:
    kill_at(RUNS[name].phases[phase][0], RUNS[name].last_number(phase))
    make_trainer(name, Path(folder), Path(folder, name, phase)).train()


class StepRecorder(TrainerCallback):
    """Records the number of each training step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


@pytest.fixture(scope="module")
def folder(tiny_model_factory, tokenizer, chat_rows, tmp_path_factory):
    """Rows, and a model with dropout, so that the random state matters."""
    folder = tmp_path_factory.mktemp("resume")
    model = tiny_model_factory()
    model.config.attention_dropout = 0.2
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with_references(chat_rows).to_json(folder / "rows.jsonl")
    return folder


@pytest.fixture(scope="module")
def unbroken(folder):
    """Uninterrupted runs by name, filled on demand."""
    return {}


def logs(trainer):
    """The log of each step, without the metrics that restart with the process: tokens seen, and flips."""
    steps = [log for log in trainer.state.log_history if "loss" in log]
    return [{name: log[name] for name in log.keys() - {"num_tokens", "sft_go/flip_rate"}} for log in steps]


@pytest.mark.cell(
    "Resume", "killed (SIGKILL) at a random step of each phase: weights bit-identical to an uninterrupted run"
)
@pytest.mark.parametrize("method, name, phase", PHASES)
def test_killed_and_resumed(method, name, phase, folder, other_process, unbroken):
    if name not in unbroken:
        unbroken[name] = make_trainer(name, folder, folder / name / "unbroken")
        unbroken[name].train()
    assert other_process.run(train_until_killed, name, phase, folder) == -signal.SIGKILL
    resumed = make_trainer(name, folder, folder / name / phase)
    recorder = StepRecorder()
    resumed.add_callback(recorder)
    moment, number = RUNS[name].phases[phase][0], RUNS[name].last_number(phase)
    resumed.train(resume_from_checkpoint=moment != "score")
    # Two micro-batches a step, and a checkpoint after each; SFTMix's reference has as many steps before
    last_step = {"step": (number - 1) // 2, "save": number - 1}.get(moment, 0)
    steps_before = 6 if name == "two_phases" else 0
    assert recorder.steps == list(range(max(last_step - steps_before, 0) + 1, 7))
    weights, expected = resumed.model.state_dict(), unbroken[name].model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in weights.items())
    assert logs(resumed) == logs(unbroken[name])
