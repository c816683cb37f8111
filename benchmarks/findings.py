"""
The findings of the registered studies, by the rules of `studies/registered.md`.

    make study-poft
    python benchmarks/findings.py poft

keeps what tables and pictures need of `studies/runs/poft/results.json` in `benchmarks/results/study_poft.json`:
everything except the test rows, the generated answers and most of the training log. Then it writes
`benchmarks/results/findings.json` from all studies that are there, also without any name.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from hf_sft_variants.files import write_text


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

LOGGED = ("step", "epoch", "loss", "nll", "eval_loss")
# The NLL of the steps against SFT must not end above this for SFTKey to help
STEPS_BOUND = 0.02


class Registered(NamedTuple):
    """A study's title, what its primary metric is the NLL of, that metric's name, and the main arms."""

    title: str
    nll_of: str
    metric: str
    main: tuple[str, ...]


STUDIES = {
    "poft": Registered("PoFT: noisy sequences", "response", "nll", ("poft",)),
    "sftkey": Registered("SFTKey: a computed answer", "answer", "NLL of answer", ("sftkey_chosen",)),
    "sftkey_gsm8k": Registered("SFTKey: GSM8K", "answer", "NLL of answer", ("sftkey_chosen",)),
    "sftmix": Registered("SFTMix: overfitting", "response", "nll", ("sftmix",)),
    "sft_go": Registered("SFT-GO: few important tokens", "content", "NLL of content", ("sft_go_25",)),
    "rho1": Registered("SFT-GO, Rho-1: wrong answers", "answer", "NLL of answer", ("rho1",)),
    "plain": Registered("Plain setting", "response", "nll", ("sft_go", "sftkey", "poft", "sftmix")),
}


def compact(results: dict) -> dict:
    return {**results, "runs": [compact_run(run) for run in results["runs"]]}


def compact_run(run: dict) -> dict:
    means = {name: metric["mean"] for name, metric in run["evaluations"].items()}
    log = [{name: value for name, value in entry.items() if is_kept(name)} for entry in run["log_history"]]
    return {
        **{name: value for name, value in run.items() if name != "generations"},
        "evaluations": means,
        "log_history": [entry for entry in log if {*entry} - {"step", "epoch"}],
    }


def is_kept(name: str) -> bool:
    return name in LOGGED or name.startswith(("sft_go/", "sftkey/", "poft/", "sftmix/"))


def findings_of(name: str, results: dict) -> dict[str, Any]:
    """A study's primary metric: SFT's, every arm's difference from SFT, the main arms' from their controls."""
    study, arms = STUDIES[name], results["study"]["arms"]
    means = {row["arm"]: row["mean"] for row in results["summary"] if row["metric"] == study.metric}
    differences = {
        (row["arm"], row["baseline"]): {key: row[key] for key in ("arm", "baseline", "difference", "low", "high")}
        for row in results["differences"]
        if row["metric"] == study.metric
        and row["arm"] != "reference"  # a means to others' end
        and (row["baseline"] == "sft" or row["arm"] in study.main)
    }
    verdicts = []
    for main in study.main:
        controls = arms[main].get("controls", [])
        strongest = min(controls, key=means.__getitem__, default=None)
        against_sft, against_control = differences[main, "sft"], differences.get((main, strongest))
        words = verdict(against_sft, against_control)
        if name.startswith("sftkey") and words == "helps" and steps_suffer(main, results):
            words = "helps the answer, but not without harm to the steps"
        verdicts.append({"arm": main, "strongest_control": strongest, "verdict": words})
    return {
        **study._asdict(),
        "seeds": results["study"]["seeds"],
        "sft": means["sft"],
        "verdicts": verdicts,
        "differences": [*differences.values()],
        "controls": sorted({control for arm in arms.values() for control in arm.get("controls", [])} - {*study.main}),
    }


def verdict(against_sft: dict, against_control: dict | None) -> str:
    if against_sft["low"] > 0:
        return "hurts"
    if against_sft["high"] < 0:
        if against_control is None or against_control["high"] < 0:
            return "helps"
        return f"better than SFT, but not shown to be better than `{against_control['baseline']}`"
    bound = max(-against_sft["low"], against_sft["high"])
    return f"no difference from SFT shown (within ±{bound:.4f})"


def steps_suffer(arm: str, results: dict) -> bool:
    return any(
        (row["arm"], row["baseline"], row["metric"]) == (arm, "sft", "NLL of steps") and row["high"] >= STEPS_BOUND
        for row in results["differences"]
    )


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(RESULTS / f"study_{name}.json", compact(read(ROOT / "studies" / "runs" / name / "results.json")))
    files = {name: RESULTS / f"study_{name}.json" for name in STUDIES}
    write(
        RESULTS / "findings.json",
        {name: findings_of(name, read(file)) for name, file in files.items() if file.exists()},
    )
