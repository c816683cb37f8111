"""Several recipes trained on the same data with the same seeds, evaluated alike, and compared."""

from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ..errors import InputError
from .files import write_json, write_text
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
    if None in devices and torch.cuda.device_count() > 1:
        raise InputError(
            f"{torch.cuda.device_count()} GPUs are visible, but a run takes one: pass --devices, e.g. --devices 0 1."
        )
    study = read_study(path)
    runs = plan_runs(study)
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


def _write(study: Study, runs: list[Run], failures: dict[Run, str]) -> None:
    results = collect_results(study, runs, failures)
    write_json(study.output_dir / "results.json", results)
    write_text(study.output_dir / "report.html", render_report(results))
