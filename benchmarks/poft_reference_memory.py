"""
Peak memory of PoFT's training after reference models have scored the data in the same process, relative to training on
scores that come with the data.

    python benchmarks/poft_reference_memory.py --output benchmarks/results/poft_reference_memory_cpu.json
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import TrainerCallback

from hf_sft_variants import PoFTConfig, PoFTTrainer
from hf_sft_variants.files import write_text


class PeakOfTraining(TrainerCallback):
    """Resets the peak at the start of training: resident memory, or memory allocated on a GPU."""

    def on_train_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def mib() -> float:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


def peaks(source: str, options: argparse.Namespace) -> dict[str, float]:
    """Peak in MiB before and during training, of a process that scores with reference models or reads a column."""
    rows = load_dataset(options.dataset, split=f"train[:{8 * options.steps}]")
    method = {"reference_models": options.references}
    if source == "column":
        rows, method = rows.add_column("ref_logps", [[-1.0] * len(options.references)] * len(rows)), {}
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        args = PoFTConfig(
            folder,
            per_device_train_batch_size=8,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            score_cache_dir=folder,
            **method,
        )
        trainer = PoFTTrainer(options.model, args, train_dataset=rows, callbacks=[PeakOfTraining()])
        before = PeakOfTraining.mib()
        trainer.train()
        return {"before_training_mib": round(before), "training_mib": round(PeakOfTraining.mib())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart/model")
    parser.add_argument("--references", nargs="+", default=["quickstart/model", "quickstart/runs/sft_baseline"])
    parser.add_argument("--dataset", default="quickstart/data")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", help="JSON file for the results")
    parser.add_argument("--only", choices=["column", "models"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(peaks(options.only, options)))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results = {"device": device, "machine": platform.machine(), "torch": torch.__version__}
    for source in ("column", "models"):  # each in its own process: memory allocated by one would count for the next
        command = [sys.executable, __file__, *sys.argv[1:], "--only", source]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[source] = json.loads(run.stdout.splitlines()[-1])
    results["ratio"] = round(results["models"]["training_mib"] / results["column"]["training_mib"], 4)
    print(json.dumps(results))
    if options.output:
        write_text(options.output, json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
