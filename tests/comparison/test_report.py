"""The page shows the results and loads nothing else."""

import copy
import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from made_up_results import ARMS, make_results

from hf_sft_variants.comparison.curves import learning_curve
from hf_sft_variants.comparison.report import render_report


class Page(HTMLParser):
    """The headings, the rows of the tables, and the elements that stay open."""

    VOID = {"meta"}

    def __init__(self, html):
        super().__init__()
        self.open, self.headings, self.rows, self.tags = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings[-1] += data
        elif {"td", "th"} & set(self.open):
            self.rows[-1][-1] += f"{data} "


def test_structure():
    results = make_results()
    page = Page(render_report(results))
    parts = ["Against controls", "Cost", "Learning curves", "Answers to the first prompts"]
    assert page.headings == [
        "Data: clean",
        *parts,
        "Data: corrupted",
        *parts,
        "How to read this",
        "How to repeat this",
    ]
    headings, *metrics = page.rows[:8]
    assert [text.strip() for text in headings] == [
        "arm",
        *(["held-out NLL", "difference", "accuracy", "difference", "my_task/acc", "difference"]),
    ]
    assert [row[0].strip() for row in metrics] == list(ARMS)
    assert metrics[0][2].strip() == "baseline"
    (difference,) = [
        row
        for row in results["differences"]
        if (row["data"], row["arm"], row["metric"]) == ("clean", "poft", "accuracy")
    ]
    interval = f"[{difference['low']:+.1%}, {difference['high']:+.1%}]"
    assert metrics[3][4].strip() == f"{difference['difference']:+.1%} {interval} {difference['verdict']}"
    (summary,) = [
        row for row in results["summary"] if (row["data"], row["arm"], row["metric"]) == ("clean", "poft", "nll")
    ]
    assert metrics[3][1].strip() == f"{summary['mean']:.4f} ± {summary['spread']:.4f}"
    controls = [[text.strip() for text in row] for row in page.rows[8:10]]  # the baseline is in the first table
    assert controls[0] == [
        "arm",
        "control",
        *(f"difference in {name}" for name in ("held-out NLL", "accuracy", "my_task/acc")),
    ]
    assert controls[1][:2] == ["sft_go", "sft_go_random"] and controls[1][3].startswith("-")
    costs = [[text.strip() for text in row] for row in page.rows[10:18]]
    assert costs[0] == ["arm", "steps", "time", "time / sft", "tokens", "peak memory"]
    assert costs[4] == [
        "poft",
        "75",
        "160.0 s 9.0 s before the first step",
        "1.60 ×",
        "61,234",
        "2.00 GiB resident on the CPU",
    ]
    assert costs[6][2] == "200.0 s 15.0 s before the first step; plus 120.0 s of sft_go"


def test_needs_nothing_from_elsewhere_and_is_the_same_again():
    html = render_report(make_results())
    assert html == render_report(json.loads(json.dumps(make_results())))
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img", html)
    assert not re.search(r"\b(nan|inf|None)\b", html)


def test_nothing_that_was_generated_is_markup():
    results = make_results(data=("clean",))
    for run in results["runs"]:
        run["generations"][0] |= {
            "generation": "<script>alert(1)</script>",
            "prompt": "</pre><b>",
            "expected": "&amp;",
        }
    results["missing"] = [{"arm": "sft", "data": "clean", "seed": 9, "error": "<i>KeyError</i>"}]
    html = render_report(results)
    assert "<script>" not in html and "<b>" not in html and "<i>" not in html
    assert "<script>alert(1)</script>" in unescape(html) and "&amp;amp;" in html
    Page(html)


def test_every_arm_has_a_line_of_its_own_without_colours():
    arms = tuple(f"arm_{i}" for i in range(18))
    html = render_report(make_results(arms=arms, seeds=(0,), data=("clean",), rows=3))
    signs = re.findall(r"svg \.line-\d+ { stroke: [^;]*; (.*?) }", html)
    assert len(set(signs)) == len(signs) == 18
    assert len(re.findall("<polyline", html)) == 18


def test_one_seed_and_runs_that_are_missing():
    one = render_report(make_results(seeds=(0,)))
    assert "which one seed does not have" in one
    assert "±" not in one.split("How to read this")[0]
    without = [(arm, "clean", seed) for arm in ARMS for seed in (0, 1, 2)] + [("poft", "corrupted", 1)]
    html = render_report(make_results(without=without))
    assert "<h2>Data: clean</h2><p>No run is finished.</p>" in html and "20 of 42 finished" in html
    assert "poft on corrupted, seed 1" in html and "2 of 3 seeds" in html
    baseline_missing = render_report(make_results(without=[("sft", "corrupted", seed) for seed in (0, 1, 2)]))
    assert "–" in baseline_missing


def test_learning_curve_is_the_plain_likelihood():
    results = [copy.deepcopy(run) for run in make_results()["runs"][:2]]
    results[0]["log_history"] = [
        {"loss": 5.0, "nll": 1.0, "step": 2},
        {"loss": 5.0, "step": 4},
        {"loss": None, "step": 6},
        {"eval_loss": 9.0, "step": 4},
        {"train_loss": 9.0, "step": 4},
    ]
    results[1]["log_history"] = [{"loss": 3.0, "step": 2}]
    assert learning_curve(results) == [(2, 2.0)]
    assert learning_curve(results[:1]) == [(2, 1.0), (4, 5.0)]


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_results_can_be_written_as_json(seeds):
    assert json.loads(json.dumps(make_results(seeds=seeds), allow_nan=False))


def test_runs_of_several_machines():
    results = make_results(seeds=(0,), data=("clean",))
    results["runs"][1]["machine"] = {**results["runs"][1]["machine"], "gpus": ["Some GPU"]}
    results["runs"][1]["versions"] = {"torch": "9.9"}
    html = render_report(results)
    assert "Some CPU, 8 cores, 32 GiB; Some GPU, Some CPU, 8 cores, 32 GiB" in html
    assert "2.13.0" in html and "9.9" in html
