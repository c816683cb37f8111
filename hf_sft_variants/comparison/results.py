"""All results of a study in one mapping, of which the report is made."""

from collections.abc import Iterator
from typing import Any

from .files import EVALUATION_FILE, TRAINING_FILE, read_json
from .plan import Run
from .statistics import compare, summarize
from .study import Study


def collect_results(study: Study, runs: list[Run], failures: dict[Run, str]) -> dict[str, Any]:
    """
    What is known so far.

    Args:
        study ([`~hf_sft_variants.comparison.study.Study`]):
            The study.
        runs (`list[Run]`):
            All its runs.
        failures (`dict[Run, str]`):
            Why a run failed.

    Returns:
        `dict[str, Any]`: `study`, `study_file`, `runs`, `missing`, `summary` and `differences`.
    """
    finished = [result_of(run) for run in runs if run.is_finished]
    missing = [
        {"arm": run.arm, "data": run.data, "seed": run.seed, "error": failures.get(run)}
        for run in runs
        if not run.is_finished
    ]
    return {
        "study": study.content,
        "study_file": study.path,
        "runs": finished,
        "missing": missing,
        "summary": list(summaries(study, finished)),
        "differences": list(differences(study, finished)),
    }


def result_of(run: Run) -> dict[str, Any]:
    evaluation = read_json(run.folder / EVALUATION_FILE)
    return {
        "arm": run.arm,
        "data": run.data,
        "seed": run.seed,
        **read_json(run.folder / TRAINING_FILE),
        "evaluations": evaluation["evaluations"],
        "generations": evaluation["generations"],
    }


def summaries(study: Study, results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for data in study.data:
        for arm in study.arms:
            by_seed = of_arm(results, data, arm)
            for name in metric_names(by_seed):
                metrics = [result["evaluations"][name] for result in by_seed.values()]
                yield {"data": data, "arm": arm, "metric": name, **summarize(metrics), "seeds": list(by_seed)}


def differences(study: Study, results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each arm from the baseline, and from its controls."""
    for data in study.data:
        for arm in study.arms.values():
            for other in dict.fromkeys((study.baseline, *arm.controls)):
                if other != arm.name:
                    yield from differences_from(other, arm.name, data, results)


def differences_from(other: str, arm: str, data: str, results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    by_seed, other_by_seed = of_arm(results, data, arm), of_arm(results, data, other)
    seeds = [seed for seed in by_seed if seed in other_by_seed]
    for name in metric_names(by_seed) if seeds else []:
        pairs = [[runs[seed]["evaluations"][name] for seed in seeds] for runs in (by_seed, other_by_seed)]
        yield {"data": data, "arm": arm, "metric": name, "baseline": other, "seeds": seeds, **compare(*pairs)}


def of_arm(results: list[dict[str, Any]], data: str, arm: str) -> dict[int, dict[str, Any]]:
    """An arm's results on a data set, by seed."""
    return {result["seed"]: result for result in results if (result["data"], result["arm"]) == (data, arm)}


def metric_names(by_seed: dict[int, dict[str, Any]]) -> list[str]:
    return list(next(iter(by_seed.values()))["evaluations"]) if by_seed else []
