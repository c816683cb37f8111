"""Started by a test: trains, and ends itself by SIGKILL in a training step, counted over both phases."""

import json
import os
import signal
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from helpers import make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from hf_sft_variants import SFTMixConfig, SFTMixTrainer


training_step = SFTTrainer.training_step
steps = []


def step_or_kill(self, *args, **kwargs):
    steps.append(type(self))
    if len(steps) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(self, *args, **kwargs)


def main(folder: Path, options: dict):
    torch.set_num_threads(1)
    SFTTrainer.training_step = step_or_kill
    # As the unbroken run: copies a model, since weights that are mapped from a file lie otherwise and round otherwise
    trainer = make_trainer(
        SFTMixTrainer,
        SFTMixConfig,
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
        Dataset.from_json(str(folder / "rows.jsonl"), cache_dir=str(folder / "cache")),
        folder / "killed",
        **options,
    )
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
