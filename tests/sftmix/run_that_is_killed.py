"""Started by a test: trains, and ends itself by SIGKILL in the reference phase, after its second checkpoint."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from hf_sft_variants import SFTMixConfig, SFTMixTrainer


training_step = SFTTrainer.training_step


def step_or_kill(self, *args, **kwargs):
    if self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(self, *args, **kwargs)


def main(folder: Path, options: dict):
    torch.set_num_threads(1)
    SFTTrainer.training_step = step_or_kill
    trainer = SFTMixTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        SFTMixConfig(str(folder / "killed"), **options, max_grad_norm=0),
        train_dataset=Dataset.from_json(str(folder / "rows.jsonl"), cache_dir=str(folder / "cache")),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
