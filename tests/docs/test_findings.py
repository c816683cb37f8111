"""Findings follow the rules of docs/registered.md, and are those of the committed results."""

import json
import random
import re
import runpy
from pathlib import Path

import pytest

from hf_sft_variants.comparison import read_study
from hf_sft_variants.comparison.evaluations import metric
from hf_sft_variants.comparison.results import differences, summaries


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FINDINGS = runpy.run_path(str(ROOT / "benchmarks" / "findings.py"))
COMMITTED = [name for name in FINDINGS["STUDIES"] if (RESULTS / f"study_{name}.json").exists()]


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def results_of(name: str, means: dict[str, float], noise: float = 0.0) -> dict:
    """Results of a study whose arms have these means in all metrics; 1 by default."""
    study, generator, runs = read_study(str(ROOT / "studies" / f"{name}.yaml")), random.Random(0), []
    for arm in study.arms:
        for seed in study.seeds:
            rows = [means.get(arm, 1.0) + noise * generator.gauss(0, 1) for _ in range(20)]
            names = ("nll", "NLL of steps", "NLL of answer", "NLL of content")
            log = [{"loss": 1.0, "grad_norm": 2.0, "step": 1}, {"grad_norm": 1.0, "step": 2}]
            run = {"arm": arm, "data": next(iter(study.data)), "seed": seed, "seconds": 2.0, "generations": ["a"]}
            runs.append({**run, "log_history": log, "evaluations": {m: metric(rows, None, False) for m in names}})
    derived = {"summary": list(summaries(study, runs)), "differences": list(differences(study, runs))}
    return {"study": study.content, "runs": runs, **derived}


@pytest.mark.parametrize(
    ("name", "means", "verdict"),
    [
        ("poft", {"poft": 0.5}, "helps"),
        ("poft", {"poft": 1.5, "sft_on_likely_rows": 2.0}, "hurts"),
        ("poft", {"poft": 0.5, "poft_constant": 0.4}, "better than SFT, but not shown .* than `poft_constant`"),
        ("poft", {"poft": 1.0, "poft_constant": 0.4}, r"no difference from SFT shown \(within ±0\.[01]\d+\)"),
        ("sftkey", {"sftkey_chosen": 0.5}, "helps"),
        ("sftmix", {"sftmix": 0.5}, "helps"),
        ("sft_go", {"sft_go_25": 0.5, "sft_go_25_random_groups": 0.5}, "better than SFT, .*_25_random_groups`"),
    ],
)
def test_verdicts(name, means, verdict):
    found = FINDINGS["findings_of"](name, results_of(name, means, noise=0.05))
    (main,) = found["verdicts"]
    assert re.fullmatch(verdict, main["verdict"])


def test_sftkey_does_not_help_at_the_expense_of_the_steps():
    results = results_of("sftkey", {"sftkey_chosen": 0.5}, noise=0.01)
    for row in results["differences"]:
        if (row["arm"], row["baseline"], row["metric"]) == ("sftkey_chosen", "sft", "NLL of steps"):
            row["high"] = 0.03
    (main,) = FINDINGS["findings_of"]("sftkey", results)["verdicts"]
    assert main["verdict"] == "helps the answer, but not without harm to the steps"


def test_the_strongest_control_has_the_lowest_primary_metric():
    means = {"poft_constant": 0.9, "sft_on_likely_rows": 0.8, "poft_beta_4": 0.1}
    found = FINDINGS["findings_of"]("poft", results_of("poft", means))
    assert found["verdicts"][0]["strongest_control"] == "sft_on_likely_rows"
    assert "poft_beta_4" not in found["controls"] and "sft_on_likely_rows" in found["controls"]


def test_the_plain_setting_has_a_verdict_for_each_method():
    found = FINDINGS["findings_of"]("plain", results_of("plain", {"sftmix": 0.5, "poft": 1.5}, noise=0.01))
    verdicts = {row["arm"]: row["verdict"] for row in found["verdicts"]}
    assert [*verdicts] == ["sft_go", "sftkey", "poft", "sftmix"]
    assert (verdicts["sftmix"], verdicts["poft"]) == ("helps", "hurts")
    assert all(row["strongest_control"] is None for row in found["verdicts"])


def test_compact_results_keep_what_the_findings_need():
    results = results_of("poft", {"poft": 0.5}, noise=0.01)
    compact = FINDINGS["compact"](results)
    assert FINDINGS["findings_of"]("poft", compact) == FINDINGS["findings_of"]("poft", results)
    run = compact["runs"][0]
    assert "generations" not in run and run["evaluations"]["nll"] == results["runs"][0]["evaluations"]["nll"]["mean"]
    assert run["log_history"] == [{"loss": 1.0, "step": 1}]


def test_every_registered_study_is_known():
    page = (ROOT / "studies" / "registered.md").read_text()
    for name, study in FINDINGS["STUDIES"].items():
        assert f"`studies/{name}.yaml`" in page
        arms = read_study(str(ROOT / "studies" / f"{name}.yaml")).arms
        assert {*study.main} <= {*arms}


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_results_are_those_of_the_committed_study(name):
    results = read(f"study_{name}")
    assert results["study"] == read_study(str(ROOT / "studies" / f"{name}.yaml")).content
    assert results["missing"] == []


def test_committed_findings_are_those_of_the_committed_results():
    findings = {name: FINDINGS["findings_of"](name, read(f"study_{name}")) for name in COMMITTED}
    assert json.loads(json.dumps(findings)) == read("findings")
