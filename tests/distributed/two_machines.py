"""
Started by `accelerate launch` as one of two machines, each with its own models, data, caches and outputs: trains each
method two steps, one after the other, and writes the results.
"""

import gc
import os
import shutil
import sys
from pathlib import Path
from unittest import mock


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import PartialState
from datasets import Dataset
from filelock import FileLock
from helpers import make_trainer
from methods import METHODS
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_sft_variants.errors import InputError
from hf_sft_variants.scoring import locks, shards


STEPS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.1,
    "optim": "sgd",
    "save_strategy": "no",
}
RHO1 = {"group_by": "rho1", "reference_model": "reference", "score_batch_tokens": 40}
CASES = {
    name: (method, options)
    for name, method, options in (
        ("tfidf", "sft_go", {"tfidf_file": "run/tfidf.npz"}),
        ("rho1", "sft_go", RHO1),
        ("sftkey", "sftkey", {"key_delimiter": "####"}),
        ("poft", "poft", {"reference_models": ["reference"], "reference_batch_tokens": 100}),
        ("sftmix", "sftmix", {"train_sampling_strategy": "random"}),
        (
            "sftmix_online",
            "sftmix",
            {"confidence_source": "online", "max_steps": 6, "train_sampling_strategy": "random"},
        ),
    )
    if method in METHODS
}


class AssertTwoMachines(TrainerCallback):
    """A launch that silently runs one process, or two that do not talk, would prove nothing."""

    def on_train_begin(self, args, state, control, **kwargs):
        assert args.world_size == torch.distributed.get_world_size() == 2
        assert PartialState().is_local_main_process and int(os.environ["LOCAL_WORLD_SIZE"]) == 1


def train(name, model, tokenizer, rows, callbacks=(), **options):
    """Log, weights and halves of a case."""
    method, own = CASES[name]
    options = {**STEPS, **({"min_grouped_tokens": 2} if method == "sft_go" else {}), **own, **options}
    trainer = make_trainer(
        *METHODS[method].classes, model, tokenizer, rows, f"run/{name}", callbacks=list(callbacks), **options
    )
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
    with mock.patch("hf_sft_variants.sft_go.reference_log_probs.load_reference_model", None):
        return train("rho1", *arguments)


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
    gc.freeze()  # a run collects garbage several times, which takes longer the more has been imported
    results = {name: train(name, *arguments, [AssertTwoMachines()]) for name in CASES}
    if "sft_go" in METHODS:
        results["rho1_served"] = train_with_the_others_scores(arguments)
        results["rho1_waited"] = train_after_waiting(arguments)
        results["other_model"] = refusal("rho1", arguments, reference_model="different")
    if "poft" in METHODS:
        model, tokenizer, rows = arguments
        own_rows = rows.select(range(6 + PartialState().process_index))
        results["other_data"] = refusal("poft", (model, tokenizer, own_rows))
    torch.save(results, "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
