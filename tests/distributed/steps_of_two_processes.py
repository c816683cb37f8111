"""Started by torchrun: a few optimizer steps for each case; the first process writes logs, gradients and weights."""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from helpers import GradientRecorder, make_trainer
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_sft_variants import (
    PoFTConfig,
    PoFTTrainer,
    SFTGOConfig,
    SFTGOTrainer,
    SFTKeyConfig,
    SFTKeyTrainer,
    SFTMixConfig,
    SFTMixTrainer,
)
from hf_sft_variants.scoring import shards


CLASSES = {
    "SFTTrainer": (SFTTrainer, SFTConfig),
    "SFTGOTrainer": (SFTGOTrainer, SFTGOConfig),
    "SFTKeyTrainer": (SFTKeyTrainer, SFTKeyConfig),
    "PoFTTrainer": (PoFTTrainer, PoFTConfig),
    "SFTMixTrainer": (SFTMixTrainer, SFTMixConfig),
}


class AssertTwoProcesses(TrainerCallback):
    """A launch that quietly runs one process, or two that do not talk, would prove nothing."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert args.world_size == torch.distributed.get_world_size() == 2
        self.checked = True

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        assert isinstance(self.trainer.model_wrapped, DistributedDataParallel)


def run_case(case, model, tokenizer, rows, output_dir):
    recorder, check = GradientRecorder(), AssertTwoProcesses()
    trainer = make_trainer(
        *CLASSES[case["trainer"]], model, tokenizer, rows, output_dir,
        callbacks=[recorder, check],
        **{"max_steps": 1, "save_strategy": "no", "train_sampling_strategy": "sequential", **case["options"]},
    )  # fmt: skip
    check.trainer = trainer
    trainer.train(resume_from_checkpoint=case.get("checkpoint"))
    evaluated = trainer.evaluate(rows.select(range(case["evaluated"]))) if "evaluated" in case else {}
    return {
        "evaluated": evaluated,
        "log": trainer.state.log_history[0],
        "learning_rates": [log["learning_rate"] for log in trainer.state.log_history if "loss" in log],
        "gradients": recorder.gradients,
        "weights": trainer.model.state_dict(),
        "halves": getattr(trainer, "halves", None),
    }


def main(folder: Path):
    shards.BATCHES_PER_SHARD = 1  # so that the few rows are shards for both processes
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = Dataset.from_json(str(folder / "rows.jsonl"), cache_dir=str(folder / "cache"))
    cases = json.loads((folder / "cases.json").read_text())
    results = {name: run_case(case, model, tokenizer, rows, folder / "run") for name, case in cases.items()}
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
