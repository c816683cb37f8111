"""Collects the results of a study in one mapping, which the report is made from."""

from collections.abc import Iterator
from typing import Any

from .files import EVALUATION_FILE, TRAINING_FILE, read_json
from .plan import Run
from .statistics import compare, summarize
from .study import Study


def collect_results(study: Study, runs: list[Run], failures: dict[Run, str]) -> dict[str, Any]:
    """Results of the runs so far: `study`, `study_file`, `runs`, `missing`, `summary` and `differences`."""
    finished = [result_of(run) for run in runs if run.is_finished]
    missing = [{**names_of(run), "error": failures.get(run)} for run in runs if not run.is_finished]
    return {
        "study": study.content,
        "study_file": study.path,
        "runs": finished,
        "missing": missing,
        "summary": list(summaries(study, finished)),
        "differences": list(differences(study, finished)),
    }


def names_of(run: Run) -> dict[str, Any]:
    return {"arm": run.arm, "data": run.data, "seed": run.seed}


def result_of(run: Run) -> dict[str, Any]:
    training, evaluation = (read_json(run.folder / name) for name in (TRAINING_FILE, EVALUATION_FILE))
    del evaluation["settings"]
    return {**names_of(run), **training, **evaluation}


def summaries(study: Study, results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each metric's mean and spread, for every arm on every data set."""
    for data in study.data:
        for arm in study.arms:
            by_seed = metrics_by_seed(results, data, arm)
            for name in next(iter(by_seed.values()), {}):
                metrics = [of_run[name] for of_run in by_seed.values()]
                yield {"data": data, "arm": arm, "metric": name, **summarize(metrics), "seeds": list(by_seed)}


def differences(study: Study, results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Differences of each arm from the baseline and from its controls, over the seeds that both have."""
    for data in study.data:
        for arm in study.arms.values():
            ours = metrics_by_seed(results, data, arm.name)
            for other in dict.fromkeys((study.baseline, *arm.controls)):
                theirs = metrics_by_seed(results, data, other)
                seeds = [seed for seed in ours if seed in theirs]
                for name in ours[seeds[0]] if seeds and other != arm.name else ():
                    pairs = [[metrics[seed][name] for seed in seeds] for metrics in (ours, theirs)]
                    row = {"data": data, "arm": arm.name, "metric": name, "baseline": other, "seeds": seeds}
                    yield {**row, **compare(*pairs)}


def metrics_by_seed(results: list[dict[str, Any]], data: str, arm: str) -> dict[int, dict[str, Any]]:
    """The metrics of an arm's runs on a data set, by seed."""
    return {run["seed"]: run["evaluations"] for run in results if (run["data"], run["arm"]) == (data, arm)}
