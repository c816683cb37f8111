"""
Trains PoFT, its uniform control and SFT on quickstart problems some of whose answers are wrong. Reports the mean τ of
the clean and of the corrupted examples during training, and the held-out NLL of each arm, for several seeds.

    trl sft --config recipes/quickstart/sft_baseline.yaml   # the second reference model
    python benchmarks/poft_corrupted_answers.py --output benchmarks/results/poft_corrupted_answers.json
"""

import argparse
import json
import random
import statistics
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from hf_sft_variants import PoFTConfig, PoFTTrainer
from hf_sft_variants.evaluation import held_out_nll
from hf_sft_variants.evaluation.answers import ANSWER_MARK
from hf_sft_variants.files import write_text
from hf_sft_variants.quickstart.data import build_splits


ARMS = {
    "sft": (SFTTrainer, SFTConfig, {}),
    "uniform": (PoFTTrainer, PoFTConfig, {"preference_weighting": "uniform"}),
    "poft": (PoFTTrainer, PoFTConfig, {"preference_weighting": "poft"}),
}


def corrupt(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """The clean rows, and the corrupted rows, which end with the answer of another row."""
    generator = random.Random(seed)
    chosen = set(generator.sample(range(len(rows)), round(share * len(rows))))
    corrupted = []
    for i in sorted(chosen):
        wrong = generator.choice([row["answer"] for row in rows if row["answer"] != rows[i]["answer"]])
        content = f"{rows[i]['reasoning']}\n{ANSWER_MARK} {wrong}"
        corrupted.append({**rows[i], "completion": [{"role": "assistant", "content": content}], "answer": wrong})
    return [row for i, row in enumerate(rows) if i not in chosen], corrupted


def run(arm: str, seed: int, clean: Dataset, corrupted: Dataset, test: Dataset, options, folder: str) -> dict:
    trainer_class, config_class, method = ARMS[arm]
    on_gpu = torch.cuda.is_available()
    if arm == "poft":  # evaluating clean and corrupted training rows separately gives the mean τ of each
        method = {**method, "reference_models": options.references, "eval_strategy": "steps", "eval_on_start": True}
    args = config_class(
        folder,
        seed=seed,
        learning_rate=1e-3,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=8,
        eval_steps=options.eval_steps,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        **method,
    )
    set_seed(seed)  # the adapter's initial weights
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(options.model),
        args,
        train_dataset=Dataset.from_list([*clean, *corrupted]),
        eval_dataset={"clean": clean, "corrupted": corrupted} if arm == "poft" else None,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    tau = {
        kind: [
            (log["step"], round(log[f"eval_{kind}_poft/tau_mean"], 4))
            for log in trainer.state.log_history
            if f"eval_{kind}_poft/tau_mean" in log
        ]
        for kind in ("clean", "corrupted")
    }
    nll = held_out_nll(trainer.model, trainer.processing_class, test)
    return {"arm": arm, "seed": seed, "held_out_nll": round(nll, 4), **({"tau": tau} if arm == "poft" else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart/model")
    parser.add_argument("--references", nargs="+", default=["quickstart/model", "quickstart/runs/sft_baseline"])
    parser.add_argument("--train_size", type=int, default=120)
    parser.add_argument("--corrupted_share", type=float, default=0.3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--eval_steps", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", help="JSON file for the results, written after each run")
    options = parser.parse_args()
    # Not the quickstart's own problems, which the second reference model was trained on
    splits = build_splits(train_size=options.train_size, seed=1)
    rows, test = splits["train"], Dataset.from_list(splits["test"])
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    results = {"options": settings, "torch": torch.__version__, "runs": []}
    for seed in range(options.seeds):
        clean, corrupted = map(Dataset.from_list, corrupt(rows, options.corrupted_share, seed))
        for arm in ARMS:
            with tempfile.TemporaryDirectory() as folder:
                results["runs"].append(run(arm, seed, clean, corrupted, test, options, folder))
            print(json.dumps(results["runs"][-1]), flush=True)
            if options.output:
                write_text(options.output, json.dumps(results, indent=2))
    for arm in ARMS:
        values = [result["held_out_nll"] for result in results["runs"] if result["arm"] == arm]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{arm:8} held-out NLL {statistics.mean(values):.4f} ± {spread:.4f} over {len(values)} seeds")


if __name__ == "__main__":
    main()
