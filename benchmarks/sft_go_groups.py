"""
SFT-GO's groups for two examples, and the untrained model's loss on each of their tokens. After
`hf-sft-variants quickstart --train-size 160`:

    python benchmarks/sft_go_groups.py --output benchmarks/results/sft_go_groups.json
"""

import argparse
import json
import tempfile

import torch
from datasets import load_dataset

from hf_sft_variants import SFTGOConfig, SFTGOTrainer
from hf_sft_variants.files import write_text
from hf_sft_variants.inspection.token_text import token_texts, visible_text
from hf_sft_variants.sft_go.loss import group_optimization


class LastBatch(SFTGOTrainer):
    """Keeps the batch of the last loss."""

    def compute_annotated_loss(self, batch):
        self.batch = batch
        return super().compute_annotated_loss(batch)


def make_trainer(model: str, dataset: str, folder: str) -> LastBatch:
    args = SFTGOConfig(folder, use_cpu=True, bf16=False, report_to="none", max_length=512)
    return LastBatch(model, args, train_dataset=load_dataset(dataset, split="train"))


def look_at(trainer: LastBatch, row: int) -> dict:
    """The supervised tokens of a training example with their groups and losses, and the resulting loss."""
    example = trainer.train_dataset[row]
    with torch.no_grad():
        inputs = trainer._prepare_inputs(trainer.data_collator([example]))
        loss = trainer.compute_loss(trainer.model.eval(), inputs)
    batch, weight = trainer.batch, trainer.args.worst_group_weight
    mask = batch.label_mask[0]
    token_ids = torch.tensor(example["input_ids"])[1:][mask].tolist()
    texts = token_texts(trainer.processing_class, set(token_ids))
    groups = group_optimization(
        batch.log_probs, mask.float()[None], batch.annotations["group_ids"], batch.sample_ids, 1, weight
    )
    return {
        "prompt": example["prompt"][0]["content"],
        "tokens": [visible_text(texts[token_id]) for token_id in token_ids],
        "group_ids": batch.annotations["group_ids"][0][mask].tolist(),
        "nll": [round(-value, 3) for value in batch.log_probs[0][mask].tolist()],
        "group_nll": [round(value, 3) for value in groups.group_nll[0].tolist()],
        "worst_group": groups.worst_group.item(),
        "worst_group_weight": weight,
        "loss": round(loss.item(), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart/model")
    parser.add_argument("--dataset", default="quickstart/data")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 11])
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options.model, options.dataset, folder)
        samples = [look_at(trainer, row) for row in options.rows]
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    results = {"options": settings, "torch": torch.__version__, "samples": samples}
    print(json.dumps(results))
    if options.output:
        write_text(options.output, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
