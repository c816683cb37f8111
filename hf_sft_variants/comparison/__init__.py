"""Several recipes trained on the same data with the same seeds, evaluated alike, and compared."""

from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ..errors import InputError
from .files import read_json, write_json, write_text
from .plan import Run, plan_runs
from .report import render_report
from .results import collect_results
from .runs import do_missing_runs
from .study import Study, read_study


__all__ = ["Study", "compare_study", "plan_runs", "read_study"]


def compare_study(path: str, devices: list[str | None] | None = None) -> tuple[dict[Run, str], Path]:
    """
    Do what is missing of a study, and write `results.json` and `report.html` to its folder after every run.

    Args:
        path (`str`):
            The study's YAML file.
        devices (`list[str | None]`, *optional*, defaults to `[None]`):
            For each of the runs at once, the GPU it sees, or `None` for what this process sees.

    Returns:
        `tuple[dict[Run, str], Path]`: Why runs have failed, and where the report is.

    Raises:
        `InputError`: If the study, or anything it names, can't be used, or it is being run already.
    """
    devices = devices or [None]
    study = read_study(path)
    check_output_dir(study)
    runs = plan_runs(study)
    check_devices(devices, runs)
    study.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(study.output_dir / ".lock", timeout=0):
            write = partial(_write, study, runs)
            write({})
            failures = do_missing_runs(runs, devices, write)
            write(failures)
    except Timeout as error:
        raise InputError(f"`output_dir` {study.output_dir} is in use: this study is being run already.") from error
    return failures, study.output_dir / "report.html"


def check_devices(devices: list[str | None], runs: list[Run]) -> None:
    """
    Raises:
        `InputError`: If a run would see several GPUs, or none of those asked for.
    """
    there = [str(i) for i in range(torch.cuda.device_count())]
    on_cpu = [run for run in runs if run.recipe.get("use_cpu")]
    if None in devices:
        if len(there) > 1 and len(on_cpu) < len(runs):
            raise InputError(
                f"{len(there)} GPUs are visible, but a run takes one: pass --devices, e.g. --devices 0 1."
            )
    elif not set(devices) <= set(there) or len(set(devices)) < len(devices):
        raise InputError(
            f"--devices is {' '.join(devices)}, but has to name different ones of "
            f"{len(there)} visible GPUs: {' '.join(there) or 'there is none'}."
        )
    elif on_cpu:
        raise InputError(f"--devices: the run {on_cpu[0]} has `use_cpu: true`, so it would take no GPU.")


def check_output_dir(study: Study) -> None:
    """
    Raises:
        `InputError`: If the folder has the results of another study.
    """
    path = study.output_dir / "results.json"
    other = read_json(path).get("study_file", study.path) if path.is_file() else study.path
    if Path(other).name != Path(study.path).name:
        raise InputError(
            f"`output_dir` {study.output_dir} has the results of {other}: choose another folder, or move {path} away."
        )


def _write(study: Study, runs: list[Run], failures: dict[Run, str]) -> None:
    results = collect_results(study, runs, failures)
    write_json(study.output_dir / "results.json", results)
    write_text(study.output_dir / "report.html", render_report(results))
