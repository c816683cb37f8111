"""
Started by `accelerate launch` as one of two machines, each with its own models, data, caches and outputs: trains each
method two steps, one after the other, and writes what became of them.
"""

import os
import shutil
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import PartialState
from datasets import Dataset
from filelock import FileLock
from helpers import make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

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
from hf_sft_variants.errors import InputError
from hf_sft_variants.scoring import locks, shards
from hf_sft_variants.sft_go import reference_log_probs


STEPS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.1,
    "optim": "sgd",
    "save_strategy": "no",
    "min_grouped_tokens": 2,
}
SFT_GO, SFTMIX = (SFTGOTrainer, SFTGOConfig), (SFTMixTrainer, SFTMixConfig)
RHO1 = {"group_by": "rho1", "reference_model": "reference", "score_batch_tokens": 40}
CASES = {
    "tfidf": (*SFT_GO, {"tfidf_file": "run/tfidf.npz"}),
    "rho1": (*SFT_GO, RHO1),
    "sftkey": (SFTKeyTrainer, SFTKeyConfig, {"key_delimiter": "####"}),
    "poft": (PoFTTrainer, PoFTConfig, {"reference_models": ["reference"], "reference_batch_tokens": 100}),
    "sftmix": (*SFTMIX, {"train_sampling_strategy": "random"}),
    "sftmix_online": (*SFTMIX, {"confidence_source": "online", "max_steps": 6, "train_sampling_strategy": "random"}),
}


class AssertTwoMachines(TrainerCallback):
    """A launch that quietly runs one process, or two that do not talk, would prove nothing."""

    def on_train_begin(self, args, state, control, **kwargs):
        assert args.world_size == torch.distributed.get_world_size() == 2
        assert PartialState().is_local_main_process and int(os.environ["LOCAL_WORLD_SIZE"]) == 1


def train(name, model, tokenizer, rows, callbacks=(), **options):
    """Log, weights and halves of a case on this machine, as on one alone with twice the accumulation."""
    trainer_class, config_class, own = CASES[name]
    known = {name: value for name, value in STEPS.items() if name in config_class.__dataclass_fields__}
    trainer = make_trainer(
        trainer_class, config_class, model, tokenizer, rows, f"run/{name}", callbacks=list(callbacks),
        **{**known, **own, **options},
    )  # fmt: skip
    trainer.train()
    return {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "weights": trainer.model.state_dict(),
        "halves": getattr(trainer, "halves", None),
    }


def load():
    model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
    return model, tokenizer, Dataset.from_json("rows.jsonl")


def train_with_the_others_scores(arguments):
    """One machine has lost its scores; a reference model must not be loaded again."""
    if PartialState().process_index == 1:
        shutil.rmtree(Path(os.environ["HF_HOME"], "hf_sft_variants", "scores"))
    load_reference_model, reference_log_probs.load_reference_model = reference_log_probs.load_reference_model, None
    result = train("rho1", *arguments)
    reference_log_probs.load_reference_model = load_reference_model
    return result


def train_after_waiting(arguments):
    """Another run holds the lock on the first machine for three tries; its result has the number of tries."""
    tries, others, try_to_lock = [], [], locks._try_to_lock

    def try_while_another_run_has_it(lock, folder):
        if not tries:
            folder.mkdir(parents=True)
            others.append(FileLock(lock.lock_file))
            others[0].acquire()
        tries.append(1)
        if len(tries) == 3:
            others[0].release()
        return try_to_lock(lock, folder)

    locks._try_to_lock, locks.LOCK_SECONDS = try_while_another_run_has_it, 0.1
    result = train("rho1", *arguments, score_cache_dir="scores_after_waiting")
    locks._try_to_lock = try_to_lock
    return {**result, "tries": len(tries)}


def refusal(name, arguments, **options):
    try:
        train(name, *arguments, **options)
    except InputError as error:
        return str(error)


def main(folder: Path):
    os.chdir(folder)
    shards.BATCHES_PER_SHARD = 1  # so that the few rows are shards for both processes
    arguments = load()
    results = {name: train(name, *arguments, [AssertTwoMachines()]) for name in CASES}
    results["rho1_served"] = train_with_the_others_scores(arguments)
    results["rho1_waited"] = train_after_waiting(arguments)
    results["other_model"] = refusal("rho1", arguments, reference_model="different")
    model, tokenizer, rows = arguments
    results["other_data"] = refusal("poft", (model, tokenizer, rows.select(range(6 + PartialState().process_index))))
    torch.save(results, "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
