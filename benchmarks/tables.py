"""
Generates the tables of figures in README and docs from the results in `benchmarks/results`.

    python benchmarks/tables.py

In every page, the text between `<!-- table: study sft sft_go -->` and `<!-- end of table -->` is replaced by the table
of these arms of the small study; `findings` gives the verdicts of the registered studies, `registered poft` all arms
of one, `curves sftmix` their validation loss; `step_time sft_go`, `step_time_256` and `scoring` give the cost of a
training step and of scoring.
"""

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from hf_sft_variants.comparison.statistics import TOO_FEW_SEEDS
from hf_sft_variants.files import write_text


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(?<=<!-- table: )(\w+)((?: \w+)*) -->\n.*?(?=<!-- end of table -->)", re.DOTALL)

# The least throughput of scoring, relative to a bare forward pass and to the naive way
SCORING_GOALS = {"bare": 0.9, "naive": 3.0}
METHODS = {
    "sft_go": "SFT-GO",
    "sftkey_full": "SFTKey, first stage",
    "sftkey_key": "SFTKey, second stage",
    "poft": "PoFT, scores present",
    "sftmix": "SFTMix",
    "weighted": "Weighted SFT",
}


def step_time_table(*methods: str) -> str:
    runs = read("step_overhead_cpu")["runs"]
    return table(["a training step of", "time", "memory"], step_times(runs, methods or METHODS))


def step_time_256_table() -> str:
    """Of rows with 256 tokens, all of them labels."""
    rows = [
        [training, *row]
        for training, name in (("LoRA", "lora"), ("full fine-tuning", "full"))
        for row in step_times(read(f"step_overhead_{name}_256_cpu")["runs"], METHODS)
    ]
    return table(["training", "a training step of", "time", "memory"], rows)


def step_times(runs: list[dict], methods: Iterable[str]) -> list[list[str]]:
    """Medians of the ratios to `SFTTrainer`, in time with quartiles."""
    rows = []
    for run in runs:
        method, (first, third) = run["method"], run["time_ratio_quartiles"]
        if method in methods:
            time = f"{run['time_ratio']:.2f} × ({first:.2f} to {third:.2f})"
            rows.append([METHODS[method], time, f"{run['memory_ratio']:.2f} ×"])
    return rows


def scoring_table() -> str:
    result, rows = read("scoring_throughput_cpu"), []
    for name, words in (
        ("bare", "a bare forward pass, no padding"),
        ("naive", "one padded sample at a time, all logits"),
    ):
        ratios = ", ".join(f"{ratio:.2f}" for ratio in result[f"ratios_to_{name}"])
        met = "met" if result[f"ratio_to_{name}"] >= SCORING_GOALS[name] else "**missed**"
        rows.append([words, f"{result[f'ratio_to_{name}']:.2f} × ({ratios})", f"{SCORING_GOALS[name]} ×", met])
    return table(["tokens scored per second, relative to", "ratio (of each round)", "goal: at least", ""], rows)


def study_table(*arms: str) -> str:
    """Each arm with its difference from the baseline, then the differences from the controls."""
    study = read("study_small")
    summary = {(row["arm"], row["metric"]): row for row in study["summary"]}
    differences = {(row["arm"], row["baseline"], row["metric"]): row for row in study["differences"]}
    baseline = study["study"]["baseline"]
    rows = []
    for arm in arms:
        cells = [f"`{arm}`"]
        for metric, form in (("nll", ".3f"), ("accuracy", ".1%")):
            row = summary[arm, metric]
            cells.append(f"{row['mean']:{form}} ± {row['spread']:{form}}")
            cells.append(difference(differences, arm, baseline, metric))
        rows.append([*cells, f"{seconds(study, arm) / seconds(study, baseline):.1f} ×"])
    pairs = dict.fromkeys((arm, other) for arm, other, _ in differences if arm in arms and other != baseline)
    for arm, other in pairs:
        cells = (difference(differences, arm, other, metric) for metric in ("nll", "accuracy"))
        rows.append([f"`{arm}` − `{other}`", "", next(cells), "", next(cells), ""])
    return table(["", "held-out NLL", f"minus `{baseline}`", "accuracy", f"minus `{baseline}`", "time"], rows)


def findings_table() -> str:
    """The main arm of each registered study, but not those of the plain setting."""
    rows = []
    for study in read("findings").values():
        differences = {(row["arm"], row["baseline"]): row for row in study["differences"]}
        for found in study["verdicts"] if len(study["verdicts"]) == 1 else ():
            arm, control = found["arm"], found["strongest_control"]
            rows.append(
                [
                    study["title"],
                    f"{study['sft']:.4f}",
                    interval(differences[arm, "sft"]),
                    f"{interval(differences[arm, control])}, `{control}`",
                    found["verdict"],
                ]
            )
    return table(["study", "SFT's NLL", "method − SFT", "method − strongest control", "verdict"], rows)


def registered_table(name: str) -> str:
    """SFT's metrics, all arms' differences from them, and then the main arms' from their controls."""
    study, main = read(f"study_{name}"), read("findings")[name]["main"]
    levels = {row["metric"]: row for row in study["summary"] if row["arm"] == "sft"}
    differences = {(row["arm"], row["baseline"], row["metric"]): row for row in study["differences"]}
    cells = [f"{row['mean']:{form_of(m)}} ± {row['spread']:{form_of(m)}}" for m, row in levels.items()]
    rows = [["`sft`", *cells, ""]]
    pairs = dict.fromkeys((arm, other) for arm, other, _ in differences)
    for arm, other in sorted(pairs, key=lambda pair: pair[1] != "sft"):
        cells = [interval(differences[arm, other, m], form_of(m, "+")) for m in levels]
        if other == "sft":
            rows.append([f"`{arm}`", *cells, f"{seconds(study, arm) / seconds(study, 'sft'):.1f} ×"])
        elif arm in main:
            rows.append([f"`{arm}` − `{other}`", *cells, ""])
    return table(["", *("NLL" if m == "nll" else m for m in levels), "time"], rows)


def curves_table(name: str) -> str:
    """Each arm's NLL of the validation rows, averaged over seeds: the lowest of all epochs, and the last."""
    study, rows = read(f"study_{name}"), []
    for arm in study["study"]["arms"]:
        losses: dict[float, list[float]] = {}
        for run in study["runs"]:
            for log in run["log_history"] if run["arm"] == arm else ():
                if "eval_loss" in log:
                    losses.setdefault(log["epoch"], []).append(log["eval_loss"])
        curve = {epoch: statistics.fmean(values) for epoch, values in losses.items()}
        best = min(curve, key=curve.__getitem__)
        rows.append([f"`{arm}`", f"{curve[best]:.4f}", f"{best:g}", f"{curve[max(curve)]:.4f}"])
    return table(["", "lowest NLL", "in epoch", "last NLL"], rows)


def seconds(study: dict, arm: str) -> float:
    return statistics.fmean(run["seconds"] for run in study["runs"] if run["arm"] == arm)


def form_of(metric: str, sign: str = "") -> str:
    return f"{sign}.1%" if metric in ("accuracy", "format") else f"{sign}.4f"


def interval(row: dict, form: str = "+.4f") -> str:
    return f"{row['difference']:{form}} ({row['low']:{form}} to {row['high']:{form}})"


def difference(differences: dict, arm: str, other: str, metric: str) -> str:
    if arm == other:
        return ""
    row = differences[arm, other, metric]
    verdict = "" if row["verdict"] == TOO_FEW_SEEDS else f": {row['verdict']}"
    return f"{interval(row, '+.1%' if metric == 'accuracy' else '+.3f')}{verdict}"


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def made(match: re.Match) -> str:
    kinds = {
        "step_time": step_time_table,
        "step_time_256": step_time_256_table,
        "scoring": scoring_table,
        "study": study_table,
        "findings": findings_table,
        "registered": registered_table,
        "curves": curves_table,
    }
    return f"{match[1]}{match[2]} -->\n{kinds[match[1]](*match[2].split())}\n"


def filled(page: str) -> str:
    """A page with its tables regenerated."""
    return TABLE.sub(made, page)


def pages() -> list[Path]:
    return [
        path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))) if TABLE.search(path.read_text())
    ]


if __name__ == "__main__":
    for page in pages():
        write_text(page, filled(page.read_text(encoding="utf-8")))
