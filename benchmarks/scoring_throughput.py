"""
Throughput of scoring, relative to an upper bound and to a simple implementation.

*bare*: forward passes (backbone and LM head, no gradient) over as many tokens in full batches without padding.
*naive*: one example per batch, padded to the maximum length, full logits and their log-softmax.

    python benchmarks/scoring_throughput.py --model quickstart/model --dataset quickstart/data --repeats 2
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer

from hf_sft_variants.comparison.machine import describe_machine
from hf_sft_variants.files import write_text
from hf_sft_variants.lm_head.forward import add_lm_head
from hf_sft_variants.scoring import LogProbScorer, cached_scores, load_reference_model


def tokenized(options: argparse.Namespace) -> Dataset:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = []
    for example in load_dataset(options.dataset, split=f"train[:{options.examples}]"):
        ids = tokenizer.apply_chat_template(example["prompt"] + example["completion"], return_dict=True)["input_ids"]
        rows.append({"input_ids": ids, "labels": ids})
    return Dataset.from_list(rows)


def score(rows: Dataset, model, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cached_scores(rows, lambda: LogProbScorer(model, per_token=True), folder, {}, options.batch_tokens, "scoring")


@torch.no_grad()
def bare(rows: Dataset, model, options: argparse.Namespace) -> None:
    """Rows of the mean length, filled to the last token."""
    tokens = torch.tensor([token for ids in rows["input_ids"] for token in ids], device=model.device)
    length = len(tokens) // len(rows)
    table = tokens[: len(tokens) // length * length].view(-1, length)
    for batch in table.split(max(options.batch_tokens // length, 1)):
        model(input_ids=batch, labels=batch, score_labels=True).log_probs.sum().item()


@torch.no_grad()
def naive(rows: Dataset, model, options: argparse.Namespace) -> None:
    for ids in rows["input_ids"]:
        ids = torch.tensor(ids, device=model.device)
        padded = torch.nn.functional.pad(ids, (0, options.max_length - len(ids)))[None]
        mask = (torch.arange(options.max_length, device=model.device) < len(ids)).long()[None]
        log_probs = model(input_ids=padded, attention_mask=mask).logits.float().log_softmax(-1)
        log_probs[0, : len(ids) - 1].gather(1, ids[1:, None]).sum().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart/model")
    parser.add_argument("--dataset", default="quickstart/data")
    parser.add_argument("--examples", type=int, default=240)
    parser.add_argument("--naive_examples", type=int, default=12, help="examples for the naive way")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    PartialState(cpu=not torch.cuda.is_available())
    rows, model = tokenized(options), load_reference_model(options.model)
    few = rows.select(range(options.naive_examples))
    ways = {"scoring": (score, rows), "bare": (bare, rows), "naive": (naive, few)}
    speeds = {name: [] for name in ways}
    add_lm_head(model)  # for the bare way
    score(few, model, options)  # warms up
    for _ in range(options.repeats):
        for name, (way, examples) in ways.items():
            start = time.perf_counter()
            way(examples, model, options)
            speeds[name].append(sum(map(len, examples["input_ids"])) / (time.perf_counter() - start))
    ratios = {
        name: [ours / other for ours, other in zip(speeds["scoring"], speeds[name], strict=True)]
        for name in ("bare", "naive")
    }
    result = {
        "machine": describe_machine(model.device),
        "torch": torch.__version__,
        "options": {name: value for name, value in vars(options).items() if name != "output"},
    }
    result |= {f"tokens_per_second_{name}": round(statistics.median(values), 1) for name, values in speeds.items()}
    for name, values in ratios.items():
        result[f"ratio_to_{name}"] = round(statistics.median(values), 3)
        result[f"ratios_to_{name}"] = [round(value, 3) for value in values]
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        write_text(options.output, text + "\n")


if __name__ == "__main__":
    main()
