"""
Time and peak memory of a training step of each method, relative to `SFTTrainer`.

Time: both trainers take turns in one process, in alternating order, so that a slow moment of the machine affects both;
the figure is the median of the pairs' ratios, with quartiles. Memory: peak resident memory of a separate process for
each trainer (on a GPU, peak allocated memory).

    python benchmarks/step_overhead.py --model quickstart/model --batch_size 8 --length 256 --pairs 12

Rows are random tokens of one length, all of them labels, or with `--rows quickstart` those of the quickstart, whose
prompts are not. `--lora` trains an adapter with the settings of the quickstart's recipes, so the head is frozen.

`--vocab_sizes` measures a model of Llama-3.2-1B's shape with random bfloat16 weights, once for each size; meant for a
GPU. `--packing off on` measures padded and packed rows; packed rows hold four examples each.

    python benchmarks/step_overhead.py --vocab_sizes 32000 128256 262144 --packing off on --length 2048
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
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
    WeightedSFTConfig,
    WeightedSFTTrainer,
)
from hf_sft_variants.comparison.machine import describe_machine, peak_memory
from hf_sft_variants.files import write_text


METHODS = {
    "sft": (SFTTrainer, SFTConfig, {}),
    "sft_go": (SFTGOTrainer, SFTGOConfig, {}),
    "sftkey_full": (SFTKeyTrainer, SFTKeyConfig, {"stages": ["full"]}),
    "sftkey_key": (SFTKeyTrainer, SFTKeyConfig, {"stages": ["key"]}),
    "poft": (PoFTTrainer, PoFTConfig, {}),
    "weighted": (WeightedSFTTrainer, WeightedSFTConfig, {"token_weight_column": "weights"}),
    "sftmix": (SFTMixTrainer, SFTMixConfig, {"confidence_split": "random"}),
}


@dataclass
class Setting:
    """Model and data that a trainer is measured on."""

    vocab_size: int | None  # of a model with random weights; None: `--model`
    packing: bool
    rows: str  # "random" or "quickstart"


def make_trainer(method: str, setting: Setting, options: argparse.Namespace, output_dir: str):
    trainer_class, config_class, method_options = METHODS[method]
    on_gpu = torch.cuda.is_available()
    args = config_class(
        output_dir,
        per_device_train_batch_size=options.batch_size,
        max_length=options.length,
        packing=setting.packing,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=False,
        report_to="none",
        **method_options,
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = options.model if setting.vocab_size is None else random_model(setting.vocab_size, options)
    if setting.rows == "quickstart":
        rows = quickstart_rows(tokenizer, options)
    else:
        rows = random_rows(setting.vocab_size or len(tokenizer), setting.packing, options)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_config = lora if options.lora else None
    trainer = trainer_class(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    return trainer, iter(trainer.get_train_dataloader())


def random_model(vocab_size: int, options: argparse.Namespace):
    """Llama-3.2-1B's shape by default."""
    heads = options.hidden_size // 64
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=4 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def random_rows(vocab_size: int, packing: bool, options: argparse.Namespace) -> Dataset:
    """Rows of full length or, for packing, a quarter of it."""
    length = options.length // 4 if packing else options.length
    num_rows = options.batch_size * (options.pairs + options.warm_up) * options.length // length
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, vocab_size, (num_rows, length), generator=generator).tolist()
    key_mask = [[int(position > 0.8 * length) for position in range(length)]] * num_rows
    weights = [[1.0 + position % 2 for position in range(length)]] * num_rows
    references = [[-2.0, -2.5, -3.0]] * num_rows
    return Dataset.from_dict(
        {"input_ids": input_ids, "key_mask": key_mask, "ref_logps": references, "weights": weights}
    )


def quickstart_rows(tokenizer, options: argparse.Namespace) -> Dataset:
    """Prompts without labels; the key is the end of the response."""
    num_rows = options.batch_size * (options.pairs + options.warm_up)
    render, rows = partial(tokenizer.apply_chat_template, return_dict=True), []
    for row in load_dataset(options.dataset, split=f"train[:{num_rows}]"):
        prompt = render(row["prompt"], add_generation_prompt=True)["input_ids"]
        ids = render(row["prompt"] + row["completion"])["input_ids"]
        start_of_key = len(ids) - max((len(ids) - len(prompt)) // 5, 1)
        rows.append(
            {
                "input_ids": ids,
                "labels": [-100] * len(prompt) + ids[len(prompt) :],
                "key_mask": [int(position >= start_of_key) for position in range(len(ids))],
                "ref_logps": [-2.0, -2.5, -3.0],
                "weights": [1.0 + position % 2 for position in range(len(ids))],
            }
        )
    return Dataset.from_list(rows)


def step(trainer, batches) -> float:
    """One optimizer step as the training loop takes it, in seconds."""
    start = time.perf_counter()
    (batch,), num_items = trainer.get_batch_samples(batches, 1, trainer.args.device)
    trainer.training_step(trainer.model, batch, num_items)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_ratio(method: str, setting: Setting, options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make_trainer(name, setting, options, folder) for name in ("sft", method)}
        seconds = {name: [] for name in trainers}
        for pair in tqdm(range(options.warm_up + options.pairs), desc=method):
            for name in sorted(trainers, reverse=pair % 2 == 1):
                seconds[name].append(step(*trainers[name]))
    seconds = {name: values[options.warm_up :] for name, values in seconds.items()}
    ratios = [ours / plain for ours, plain in zip(seconds[method], seconds["sft"], strict=True)]
    first, median, third = statistics.quantiles(ratios, n=4)
    return {
        "time_ratio": round(median, 4),
        "time_ratio_quartiles": [round(first, 4), round(third, 4)],
        "seconds_sft": round(statistics.median(seconds["sft"]), 3),
        "seconds": round(statistics.median(seconds[method]), 3),
    }


def memory_of_three_steps(method: str, setting: Setting, options: argparse.Namespace) -> float:
    """Peak memory in MiB of this process, which takes three steps with one trainer."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, batches = make_trainer(method, setting, options, folder)
        for _ in range(3):
            step(trainer, batches)
    return peak_memory(trainer.args.device)["peak_memory_bytes"] / 2**20


def memory_of_a_process(method: str, setting: Setting) -> float:
    only = json.dumps([method, *vars(setting).values()])
    command = [sys.executable, __file__, *sys.argv[1:], "--only_memory_of", only]
    # Without it, what glibc keeps of freed memory changes from run to run, by up to a half of the peak
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(run.stdout.splitlines()[-1])


def measure(setting: Setting, options: argparse.Namespace) -> Iterator[dict]:
    plain_memory = memory_of_a_process("sft", setting)
    for method in options.methods:
        memory = memory_of_a_process(method, setting)
        yield {
            "method": method,
            **vars(setting),
            **time_ratio(method, setting, options),
            "memory_ratio": round(memory / plain_memory, 4),
            "memory_mib": round(memory),
            "memory_mib_sft": round(plain_memory),
        }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart/model", help="also the tokenizer of the random models")
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[None], help="models with random weights")
    parser.add_argument("--hidden_size", type=int, default=2048, help="of the random models")
    parser.add_argument("--layers", type=int, default=16, help="of the random models")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS)[1:], default=list(METHODS)[1:])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of each row")
    parser.add_argument("--pairs", type=int, default=12, help="timed pairs of steps")
    parser.add_argument("--warm_up", type=int, default=2, help="pairs before the timed ones")
    parser.add_argument("--packing", nargs="+", choices=("off", "on"), default=["off"])
    parser.add_argument("--rows", nargs="+", choices=("random", "quickstart"), default=["random"])
    parser.add_argument("--dataset", default="quickstart/data", help="for `--rows quickstart`")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--output", help="JSON file for the results")
    parser.add_argument("--only_memory_of", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = build_parser().parse_args()
    if options.only_memory_of:
        method, *setting = json.loads(options.only_memory_of)
        print(memory_of_three_steps(method, Setting(*setting), options))
        return
    settings = [
        Setting(size, packing == "on", rows)
        for size, packing, rows in itertools.product(options.vocab_sizes, options.packing, options.rows)
    ]
    asked = {name: value for name, value in vars(options).items() if name not in ("output", "only_memory_of")}
    results = {
        "machine": describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "options": asked,
        "runs": [],
    }
    for setting in settings:
        for run in measure(setting, options):
            print(json.dumps(run), flush=True)
            results["runs"].append(run)
            if options.output:  # after each: a run on a GPU may be cut off
                write_text(options.output, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
