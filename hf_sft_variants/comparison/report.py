"""The results of a study as one self-contained HTML page."""

import statistics
from collections.abc import Iterable
from shlex import quote
from typing import Any

import yaml

from ..pages import render
from .curves import learning_curve, line_styles, plot
from .statistics import LEVEL, MIN_SEEDS
from .study import OTHER_RUN, texts_in


_SHARES = ("accuracy", "format")


def render_report(results: dict[str, Any]) -> str:
    """
    Render the results from [`~hf_sft_variants.comparison.results.collect_results`], complete or not, as HTML. The same
    results give the same HTML.
    """
    study, runs = results["study"], results["runs"]
    header = {
        "arms": ", ".join(study["arms"]),
        "baseline": study["baseline"],
        "seeds": ", ".join(map(str, study["seeds"])),
        "runs": f"{len(runs)} of {len(runs) + len(results['missing'])} finished",
        "machine": "; ".join(_distinct(_describe(run["machine"]) for run in runs)),
    }
    return render(
        __package__,
        title=results["study_file"],
        header=header,
        study=study,
        study_yaml=yaml.safe_dump(study, sort_keys=False, allow_unicode=True),
        arms=list(study["arms"]),
        line_styles=line_styles(len(study["arms"])),
        missing=results["missing"],
        sections=[_section(results, data) for data in study["data"]],
        command=f"hf-sft-variants compare --config {quote(results['study_file'])}",
        versions=[dict(versions) for versions in _distinct(tuple(run["versions"].items()) for run in runs)],
        level=LEVEL,
        min_seeds=MIN_SEEDS,
        figure=_figure,
        names={"nll": "held-out NLL"},
    )


def _describe(machine: dict[str, Any]) -> str:
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB"
    return ", ".join([*machine["gpus"], cpu])


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _figure(metric: str, value: float, sign: str = "") -> str:
    """Shares in per cent, likelihoods and task metrics as they are."""
    return f"{value:{sign}.1%}" if metric in _SHARES else f"{value:{sign}.4f}"


def _section(results: dict[str, Any], data: str) -> dict[str, Any]:
    """The finished runs on a data set: by arm, and their metrics, differences, costs, curves and answers."""
    study = results["study"]
    by_arm = {
        arm: [run for run in results["runs"] if (run["data"], run["arm"]) == (data, arm)] for arm in study["arms"]
    }
    by_arm = {arm: runs for arm, runs in by_arm.items() if runs}
    summary, differences = ([row for row in results[key] if row["data"] == data] for key in ("summary", "differences"))
    return {
        "data": data,
        "runs": by_arm,
        "metrics": _distinct(row["metric"] for row in summary),
        "summary": {(row["arm"], row["metric"]): row for row in summary},
        "differences": {(row["arm"], row["baseline"], row["metric"]): row for row in differences},
        "controls": _distinct(
            (row["arm"], row["baseline"]) for row in differences if row["baseline"] != study["baseline"]
        ),
        "costs": {arm: _cost(by_arm, arm, study) for arm in by_arm},
        "plot": plot({arm: learning_curve(runs) for arm, runs in by_arm.items()}),
        "answers": {f"{arm}, seed {runs[0]['seed']}": runs[0]["generations"] for arm, runs in by_arm.items()},
    }


def _cost(by_arm: dict[str, list[dict[str, Any]]], arm: str, study: dict[str, Any]) -> dict[str, Any]:
    """Means over an arm's seeds; the time of other arms whose models it uses is given separately."""
    baseline, runs = study["baseline"], by_arm[arm]
    needed = _distinct(
        name for text in texts_in(study["arms"][arm].get("overrides")) for name in OTHER_RUN.findall(text)
    )
    return {
        **{key: _mean(runs, key) for key in ("steps", "seconds", "seconds_before_training", "tokens")},
        "ratio": _mean(runs, "seconds") / _mean(by_arm[baseline], "seconds") if baseline in by_arm else None,
        "needed": {name: _mean(by_arm[name], "seconds") for name in needed if name in by_arm},
        "gib": max(run["peak_memory_bytes"] for run in runs) / 2**30,
        "memory_kinds": sorted({run["memory_kind"] for run in runs}),
    }


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)
