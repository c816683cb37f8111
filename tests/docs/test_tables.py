"""The tables in README and docs match the committed results."""

import json
import runpy
from pathlib import Path

import pytest
from methods import METHODS

from hf_sft_variants.comparison import read_study
from hf_sft_variants.comparison.results import differences, summaries


ROOT = Path(__file__).parents[2]
TABLES = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
PAGES = [
    "README.md",
    "docs/reproducibility.md",
    "docs/when_it_helps.md",
    *(f"docs/methods/{method}.md" for method in METHODS if method != "base"),
]


def test_tables_are_up_to_date():
    assert sorted(str(path.relative_to(ROOT)) for path in TABLES["pages"]()) == sorted(PAGES)
    for name in PAGES:
        page = (ROOT / name).read_text()
        assert TABLES["filled"](page) == page, "run: python benchmarks/tables.py"
        assert page.count("<!-- table: ") == page.count("<!-- end of table -->") == len(TABLES["TABLE"].findall(page))


def test_every_method_and_every_arm_is_in_the_docs():
    overhead = json.loads((ROOT / "benchmarks/results/step_overhead_cpu.json").read_text())
    assert {run["method"] for run in overhead["runs"]} == set(TABLES["METHODS"])
    page = (ROOT / "docs/when_it_helps.md").read_text()
    assert all(f"| `{arm}` |" in page for arm in read_study(str(ROOT / "studies/small.yaml")).arms)


def test_the_committed_results_are_those_of_the_committed_study():
    """Recomputes everything derived from the rows."""
    results = json.loads((ROOT / "benchmarks/results/study_small.json").read_text())
    study = read_study(str(ROOT / "studies/small.yaml"))
    assert results["study"] == study.content and results["missing"] == []
    assert list(summaries(study, results["runs"])) == results["summary"]
    for again, committed in zip(differences(study, results["runs"]), results["differences"], strict=True):
        for name in ("low", "high"):  # other versions of NumPy may sum in another order
            assert again.pop(name) == pytest.approx(committed.pop(name))
        assert again == committed


def test_filling_leaves_the_rest_of_a_page():
    study, scoring, end = "<!-- table: study sft -->\n", "<!-- table: scoring -->\n", "<!-- end of table -->\n"
    page = TABLES["filled"](f"before\n\n{study}{end}\nbetween\n\n{scoring}{end}after\n")
    assert page.startswith(f"before\n\n{study}| ") and page.endswith(f" |\n{end}after\n")
    assert f" |\n{end}\nbetween\n\n{scoring}| " in page
    assert TABLES["filled"](page) == page
