"""Runs of all methods that are killed in each of their phases; started by a test, it kills those it is told to."""

import json
import os
import random
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from helpers import SMALL
from methods import METHODS
from peft import LoraConfig
from transformers import Trainer
from trl import SFTTrainer

from hf_sft_variants.scoring import LogProbScorer
from hf_sft_variants.sftmix import confidence


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

# What a process counts until it is killed
MOMENTS = {
    "step": (SFTTrainer, "training_step"),  # of a micro-batch
    "save": (Trainer, "_save_optimizer_and_scheduler"),  # the weights are on disk already
    "score": (LogProbScorer, "__call__"),  # of a batch
    "measure": (confidence, "write_parquet"),  # of a checkpoint of SFTMix's reference; the last one is of all
}


@dataclass
class Run:
    """A configuration, and its phases: what is counted, and the numbers among which the last one is drawn."""

    method: str
    options: dict
    phases: dict[str, tuple[str, int, int]]
    lora: bool = False
    scored: bool = field(default=False)  # whether the rows bring what reference models think of them

    def last_number(self, phase: str) -> int:
        """When the process is killed: random, but always the same."""
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
    """The trainer of a run, as each process makes it; `folder` has the model and the rows."""
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


def kill_at(moment: str, number: int) -> None:
    """Let this process end when it does something for the `number`-th time."""
    owner, name = MOMENTS[moment]
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def killed_run(name: str, phase: str, folder: Path) -> int:
    """Start a run in a process of its own; returns the signal that ended it, 0 if none did."""
    process = os.fork()
    if process:
        return os.WTERMSIG(os.waitpid(process, 0)[1])
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the run logs is no answer
    run = RUNS[name]
    kill_at(run.phases[phase][0], run.last_number(phase))
    make_trainer(name, folder, folder / name / phase).train()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    disable_progress_bars()
    for line in sys.stdin:
        sys.stdout.write(f"{killed_run(*json.loads(line), Path(sys.argv[1]))}\n")
        sys.stdout.flush()
