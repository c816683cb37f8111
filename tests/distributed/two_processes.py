"""Runs of a few optimizer steps, which `test_two_processes.py` makes on one process and on two."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from helpers import GradientRecorder, make_trainer
from methods import METHODS, SFT
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_sft_variants.scoring import shards


# Eight rows in one optimizer step each; packed to four rows of at most 40 tokens
PADDED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
PACKED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "packing": True, "max_length": 40}
OWN_GROUPS = {"group_by": "column", "group_column": "mine"}
RANDOM_PAIRS = {"confidence_split": "random", "train_sampling_strategy": "random"}
SEPARATE_COUNTS = {"average_tokens_across_devices": False}
# Two steps with the whole response, two with the key, each stage with a warm-up
STAGES = {"max_steps": 4, "learning_rate": 1e-2, "stage_learning_rates": [1e-2, 2e-3], "warmup_steps": 1}
# Two epochs of two steps, after a reference of the same length; the checkpoint is inside the second epoch
PHASES = {
    "max_steps": 4,
    "learning_rate": 0.1,
    "optim": "sgd",
    "save_strategy": "steps",
    "save_steps": 3,
    "train_sampling_strategy": "random",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
}
# Batches of three for each process: of five rows, or of eight packed into four, some are repeated
EVALUATION = {"per_device_eval_batch_size": 3, "learning_rate": 0.0}


@dataclass
class Case:
    """A run of a method."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    resumes: str | None = None  # another case, from its third step
    num_evaluated: int = 0
    as_sft_trainer: bool = False


STEPS = {
    "padded": Case("sft_go"),
    "uniform": Case("sft_go", {"sample_weighting": "uniform"}),
    "own_groups": Case("sft_go", OWN_GROUPS),
    "packed": Case("sft_go", PACKED),
    "packed_uniform": Case("sft_go", {**PACKED, **OWN_GROUPS, "sample_weighting": "uniform"}),
    "key": Case("sftkey", {"stages": ["key"]}),
    "key_and_full": Case("sftkey", {"stages": ["key"], "full_loss_weight": 0.3}),
    "key_weighted": Case("sftkey", {"stages": ["full"], "key_loss_weight": 3.7}),
    "key_packed": Case("sftkey", {**PACKED, "stages": ["key"]}),
    "poft": Case("poft", {"beta": 2.0, "gamma": 0.5}),
    "poft_packed": Case("poft", PACKED),
    "poft_uniform": Case("poft", {"preference_weighting": "uniform"}),
    "sftmix": Case("sftmix", RANDOM_PAIRS),
    "sftmix_packed": Case("sftmix", {**PACKED, "confidence_split": "random"}),
}
RUNS = {
    "phases": Case("sftmix", PHASES),
    "online": Case("sftmix", {**PHASES, "confidence_source": "online"}),
}
EVALUATIONS = {
    f"{method}_{layout}": Case(method, {**common, **options, **EVALUATION}, num_evaluated=number)
    for method, options in (
        ("sft_go", {}), ("sftkey", {"stages": ["key"]}), ("poft", {}), ("sftmix", RANDOM_PAIRS)
    )
    for layout, common, number in (("padded", PADDED, 5), ("packed", PACKED, 8))
}  # fmt: skip
OTHERS = {
    "stages": Case("sftkey", STAGES),
    "phases_resumed": Case("sftmix", PHASES, resumes="phases"),
    "online_resumed": Case("sftmix", RUNS["online"].options, resumes="online"),
    "rho1": Case("sft_go", {"group_by": "rho1", "score_batch_tokens": 40}),
    "separate_counts": Case("sft_go", {**SEPARATE_COUNTS, "worst_group_weight": 0}),
    "separate_counts_of_sft_trainer": Case("sft_go", SEPARATE_COUNTS, as_sft_trainer=True),
}


def of_methods(cases: dict[str, Case]) -> dict[str, Case]:
    return {name: case for name, case in cases.items() if case.method in METHODS}


class AssertTwoProcesses(TrainerCallback):
    """A launch that silently runs one process, or two that do not talk, would prove nothing."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        assert args.world_size == torch.distributed.get_world_size() == 2
        assert isinstance(self.trainer.model_wrapped, DistributedDataParallel)


def make_trainer_of(case: Case, folder: Path, output_dir: Path, callbacks=(), **options):
    options = {
        "max_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        **PADDED,
        **case.options,
        **options,
    }
    if options.get("group_by") == "rho1":
        options |= {"reference_model": str(folder / "reference"), "score_cache_dir": str(output_dir / "scores")}
    return make_trainer(
        *(SFT if case.as_sft_trainer else METHODS[case.method].classes),
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
        load_rows(folder),
        output_dir,
        callbacks=list(callbacks),
        **options,
    )


def load_rows(folder: Path) -> Dataset:
    return Dataset.from_json(str(folder / "rows.jsonl"), cache_dir=str(folder / "cache"))


def run(case: Case, folder: Path, output_dir: Path, callback=None, **options) -> dict[str, Any]:
    recorder = GradientRecorder()
    trainer = make_trainer_of(case, folder, output_dir, [recorder], **options)
    if callback is not None:
        trainer.add_callback(callback(trainer))
    trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-3") if case.resumes else None)
    rows = load_rows(folder).select(range(case.num_evaluated))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "log": logs[0],
        "learning_rates": [log["learning_rate"] for log in logs],
        "gradients": recorder.gradients,
        "weights": trainer.model.state_dict(),
        "halves": getattr(trainer, "halves", None),
        "evaluated": trainer.evaluate(rows) if case.num_evaluated else {},
    }


def run_on_two(folder: str) -> None:
    """Called by both processes; the first writes logs, gradients and weights."""
    folder = Path(folder)
    shards.BATCHES_PER_SHARD = 1  # so that both processes score some of the few rows
    cases = of_methods({**STEPS, **RUNS, **EVALUATIONS, **OTHERS})
    results = {
        name: run(case, folder, folder / "two" / (case.resumes or name), AssertTwoProcesses)
        for name, case in cases.items()
    }
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()
