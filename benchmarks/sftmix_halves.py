"""
SFTMix's halves from a reference's confidence, and what is mixed from one pair in the first step. After
`hf-sft-variants quickstart --train-size 160` and `trl sft --config recipes/quickstart/sftmix.yaml`:

    python benchmarks/sftmix_halves.py --output benchmarks/results/sftmix_halves.json
"""

import argparse
import json
import tempfile

import pyarrow.parquet as pq
import torch
from datasets import load_dataset

from hf_sft_variants import SFTMixConfig, SFTMixTrainer
from hf_sft_variants.files import write_text
from hf_sft_variants.inspection.token_text import token_texts, visible_text
from hf_sft_variants.sftmix.mixing import documents_of, draw_pairs, mixup_inputs


def pair_of_first_step(options: argparse.Namespace, folder: str) -> dict:
    """Labels of a confident and an unconfident example, the weight of the first, and the number of mixed positions."""
    args = SFTMixConfig(
        folder,
        confidence_source="file",
        confidence_file=options.confidence_file,
        per_device_train_batch_size=8,
        max_length=512,
        seed=options.seed,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = SFTMixTrainer(options.model, args, train_dataset=load_dataset(options.dataset, split="train"))
    inputs = next(iter(trainer.get_train_dataloader()))
    pair = draw_pairs(documents_of(inputs, trainer.halves), args.seed, 0, shuffle=False)[options.pair]
    weights = mixup_inputs([pair], args.mixup_alpha, args.seed, 0, inputs["labels"].device)["mixup_weights"]
    token_ids = [inputs["labels"][tuple(document.positions.T)].tolist() for document in pair]
    texts = token_texts(trainer.processing_class, {*token_ids[0], *token_ids[1]})
    confident, unconfident = [[visible_text(texts[token_id]) for token_id in ids] for ids in token_ids]
    return {
        "confident": confident,
        "unconfident": unconfident,
        "lambda": round(weights[0], 3),
        "mixed_positions": len(weights),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart/model")
    parser.add_argument("--dataset", default="quickstart/data")
    parser.add_argument("--confidence-file", default="quickstart/runs/sftmix/reference/confidence.parquet")
    parser.add_argument("--pair", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    examples = pq.read_table(options.confidence_file).sort_by("rank")
    with tempfile.TemporaryDirectory() as folder:
        pair = pair_of_first_step(options, folder)
    results = {
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "torch": torch.__version__,
        "mean_perplexity": [round(value, 4) for value in examples["mean_perplexity"].to_pylist()],
        "half": examples["half"].to_pylist(),
        "pair": pair,
    }
    print(json.dumps(results))
    if options.output:
        write_text(options.output, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
