"""
Time and peak memory of the LM head alone, forward and backward: ours, TRL's, and Liger's where it is installed and
there is a GPU. The unit is one product `hidden @ weight.T`, measured in the same round.

    python benchmarks/lm_head.py --rows 171 2040 --vocab_sizes 49152 --hidden_size 576 --dtypes float32

A mixture is scored for each pair of rows with `--methods ours_paired`. Peak memory is the allocator's, on a GPU only.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from trl.kernels import ChunkedLogProbFunction

from hf_sft_variants.comparison.machine import describe_machine
from hf_sft_variants.lm_head import label_log_probs


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def product(hidden, weight, labels):
    """The unit, in parts, so that it needs no memory for all logits."""
    for chunk in weight.split(8192):
        hidden @ chunk.T


def ours(hidden, weight, labels):
    return label_log_probs(hidden, weight, None, labels).log_probs.sum()


def ours_paired(hidden, weight, labels):
    first, second = torch.arange(len(labels) // 2 * 2, device=DEVICE).view(2, -1)
    outputs = label_log_probs(hidden, weight, None, labels, first, second, torch.full(first.shape, 0.3, device=DEVICE))
    return outputs.log_probs.sum() + outputs.mixed_log_probs.sum()


def of_trl(hidden, weight, labels):
    names = ("log_probs", "entropy", "is_top1")  # as SFTTrainer asks for
    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, names)[0].sum()


def of_liger(hidden, weight, labels):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum")


METHODS = {"ours": ours, "ours_paired": ours_paired, "trl": of_trl, "liger": of_liger}


def seconds_of(function: Callable, *inputs: torch.Tensor) -> tuple[float, float]:
    """Time of forward and backward, and peak memory in MiB beside the inputs."""
    for tensor in inputs:
        tensor.grad = None
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    if function is product:
        with torch.no_grad():
            product(*inputs)
    else:
        function(*inputs).backward()
    if DEVICE.type != "cuda":
        return time.perf_counter() - start, 0.0
    torch.cuda.synchronize()
    return time.perf_counter() - start, (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(num_rows: int, vocab_size: int, is_trained: bool, dtype: str, options: argparse.Namespace) -> dict:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(size, options.hidden_size, generator=generator).to(DEVICE, getattr(torch, dtype))
        for size in (num_rows, vocab_size)
    )
    weight.mul_(0.02).requires_grad_(is_trained)
    inputs = hidden.requires_grad_(), weight, torch.randint(vocab_size, (num_rows,), generator=generator).to(DEVICE)
    functions = {"product": product, **{name: METHODS[name] for name in options.methods}}
    rounds = {name: [] for name in functions}
    memory = {}
    for number in range(options.warm_up + options.rounds):
        for name in sorted(functions, reverse=number % 2 == 1):
            seconds, mebibytes = seconds_of(functions[name], *inputs)
            if number >= options.warm_up:
                rounds[name].append(seconds)
                memory[name] = mebibytes
    ratios = {
        name: [seconds / unit for seconds, unit in zip(rounds[name], rounds["product"], strict=True)]
        for name in options.methods
    }
    result = {"rows": num_rows, "vocab_size": vocab_size, "trained": is_trained, "dtype": dtype}
    result["seconds_of_a_product"] = round(statistics.median(rounds["product"]), 6)
    for name, values in ratios.items():
        first, median, third = statistics.quantiles(values, n=4)
        result[name] = {"products": round(median, 2), "quartiles": [round(first, 2), round(third, 2)]}
        if DEVICE.type == "cuda":
            result[name]["peak_memory_mib"] = round(memory[name])
    return result


def main() -> None:
    on_gpu = DEVICE.type == "cuda"
    available = [name for name in METHODS if name != "liger" or (on_gpu and find_spec("liger_kernel"))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[171, 2048, 8192])
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[32768, 131072, 262144])
    parser.add_argument("--hidden_size", type=int, default=2048 if on_gpu else 576)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16" if on_gpu else "float32"])
    parser.add_argument("--weights", nargs="+", choices=("frozen", "trained"), default=["frozen", "trained"])
    parser.add_argument("--methods", nargs="+", choices=available, default=available)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--warm_up", type=int, default=2, help="rounds before the timed ones")
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    results = {
        "machine": describe_machine(DEVICE),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "runs": [],
    }
    for weights, dtype, vocab_size, num_rows in itertools.product(
        options.weights, options.dtypes, options.vocab_sizes, options.rows
    ):
        results["runs"].append(measure(num_rows, vocab_size, weights == "trained", dtype, options))
        print(json.dumps(results["runs"][-1]), flush=True)
        if options.output:  # after each: a run on a GPU may be cut off
            Path(options.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
