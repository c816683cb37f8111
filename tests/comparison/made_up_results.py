"""Results of a study that was never run."""

import random

from hf_sft_variants.comparison.evaluations import metric
from hf_sft_variants.comparison.results import differences, summaries
from hf_sft_variants.comparison.study import parse_study


ARMS = ("sft", "sft_go", "sft_go_random", "poft", "sft_longer", "sftmix", "sftkey")
CONTROLS = {"sft_go": ["sft_go_random", "sft"], "sftmix": ["sft"]}


def make_results(arms=ARMS, seeds=(0, 1, 2), data=("clean", "corrupted"), rows=40, without=()):
    """Each arm a little better than the one before, on every data set; `without` are runs that are missing."""
    content = {
        "output_dir": "studies/small",
        "seeds": list(seeds),
        "baseline": arms[0],
        "data": {name: {"dataset_name": f"quickstart/{name}"} for name in data},
        "arms": {arm: {"recipe": f"recipes/{arm}.yaml"} for arm in arms},
    }
    if "sftmix" in arms:
        content["arms"]["sftmix"]["overrides"] = {"confidence_file": "{runs}/sft_go/seed_{seed}/confidence.parquet"}
    for arm, controls in CONTROLS.items():
        if arm in arms:
            content["arms"][arm]["controls"] = controls
    study = parse_study(content, "recipes/studies/small.yaml")
    names = [(arm, name, seed) for name in data for arm in arms for seed in seeds]
    runs = [
        make_run(arms.index(arm), arm, name, seed, rows)
        for arm, name, seed in names
        if (arm, name, seed) not in without
    ]
    return {
        "study": content,
        "study_file": study.path,
        "runs": runs,
        "missing": [{"arm": arm, "data": name, "seed": seed, "error": None} for arm, name, seed in without],
        "summary": list(summaries(study, runs)),
        "differences": list(differences(study, runs)),
    }


def make_run(number, arm, data, seed, rows):
    generator = random.Random(f"{arm} {data} {seed}")
    difficulty = random.Random(data)
    losses = [(difficulty.uniform(0.2, 1.0) - 0.05 * number) * generator.uniform(0.9, 1.1) for _ in range(rows)]
    right = [int(difficulty.random() + generator.uniform(-0.1, 0.1) < 0.5 + 0.05 * number) for _ in range(rows)]
    curve = [
        {"loss": 1 / (1 + step / 20) + generator.uniform(0, 0.1) - 0.02 * number, "step": step}
        for step in range(5, 80, 5)
    ]
    return {
        "arm": arm,
        "data": data,
        "seed": seed,
        "steps": 75,
        "seconds": 100.0 + 20 * number,
        "seconds_before_training": 3.0 * number,
        "tokens": 61234.0,
        "peak_memory_bytes": 2**31,
        "memory_kind": "resident on the CPU",
        "machine": {"cpu": "Some CPU", "cores": 8, "memory_bytes": 2**35, "gpus": [], "os": "Linux"},
        "versions": {"hf_sft_variants": "0.1.0", "torch": "2.13.0"},
        "log_history": [*curve, {"train_loss": 0.5, "step": 75}],
        "evaluations": {
            "nll": metric([12 * loss for loss in losses], [12] * rows, higher_is_better=False),
            "accuracy": metric(right),
            "my_task/acc": {
                "mean": sum(right) / rows,
                "rows": None,
                "counts": None,
                "higher_is_better": True,
                "stderr": 0.1,
            },
        },
        "generations": [
            {
                "prompt": f"What is {i} plus 2?\nThink.",
                "expected": f"#### {i + 2}",
                "generation": f"I think\n#### {i + number}",
            }
            for i in range(2)
        ],
    }
