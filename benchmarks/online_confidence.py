"""
Compares the confidence that SFTMix derives from training itself (`confidence_source="online"`) with the tracked
confidence, which evaluates the data after each epoch: rank correlation, and share of the examples in the same half.

    python benchmarks/online_confidence.py --output benchmarks/results/online_confidence_cpu.json
"""

import argparse
import json
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import torch
from datasets import load_dataset
from peft import LoraConfig
from scipy.stats import spearmanr
from transformers import TrainerCallback

from hf_sft_variants import ConfidenceTrackingCallback, SFTMixConfig, SFTMixTrainer
from hf_sft_variants.files import write_text


class OnlinePerplexities(TrainerCallback):
    """Records each example's mean perplexity over the epochs so far, at the end of every epoch."""

    def __init__(self):
        self.after_epoch = []

    def on_epoch_end(self, args, state, control, **kwargs):
        perplexity_sums, _, times = self.trainer._online.sums.clone()
        self.after_epoch.append((perplexity_sums / times).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart/model")
    parser.add_argument("--dataset", default="quickstart/data")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    online, on_gpu = OnlinePerplexities(), torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        args = SFTMixConfig(
            folder,
            confidence_source="online",
            mixup_weight=0.0,
            num_train_epochs=options.epochs,
            learning_rate=1e-3,
            per_device_train_batch_size=8,
            seed=options.seed,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
        )
        online.trainer = SFTMixTrainer(
            options.model,
            args,
            train_dataset=load_dataset(options.dataset, split=f"train[:{options.rows}]"),
            callbacks=[online],
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        online.trainer.add_callback(ConfidenceTrackingCallback(online.trainer, Path(folder) / "confidence.parquet"))
        online.trainer.train()
        tracked = pq.read_table(Path(folder) / "confidence.parquet")["mean_perplexity"].to_numpy()
    half = len(tracked) // 2
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    results = {"options": settings, "torch": torch.__version__, "after_epoch": []}
    for values in online.after_epoch:
        same = (values.argsort().argsort() < half) == (tracked.argsort().argsort() < half)
        correlation = spearmanr(values, tracked).statistic
        results["after_epoch"].append({"rank_correlation": round(correlation, 3), "same_half": round(same.mean(), 3)})
    print(json.dumps(results))
    if options.output:
        write_text(options.output, json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
