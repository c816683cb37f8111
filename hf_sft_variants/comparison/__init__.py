"""Training several recipes on the same data with the same seeds, evaluating them alike, and comparing them."""

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
    Do what is missing of a study, writing `results.json` and `report.html` to its folder after every run.

    Args:
        path (`str`):
            The study's YAML file.
        devices (`list[str | None]`, *optional*, defaults to `[None]`):
            The GPU that each of the runs at once sees, or `None` for all.

    Returns:
        `tuple[dict[Run, str], Path]`: Why runs failed, and the path of the report.

    Raises:
        `InputError`: If the study or anything it names can't be used, or it is running already.
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
        raise InputError(f"`output_dir` {study.output_dir} is in use: this study is running already.") from error
    return failures, study.output_dir / "report.html"


def check_devices(devices: list[str | None], runs: list[Run]) -> None:
    """
    Raises:
        `InputError`: If a run would see several GPUs, or the GPUs asked for are not visible.
    """
    visible = [str(i) for i in range(torch.cuda.device_count())]
    on_cpu = [run for run in runs if run.recipe.get("use_cpu")]
    if None in devices:
        if len(visible) > 1 and len(on_cpu) < len(runs):
            raise InputError(
                f"{len(visible)} GPUs are visible, but a run takes one: pass --devices, e.g. --devices 0 1."
            )
    elif not set(devices) <= set(visible) or len(set(devices)) < len(devices):
        raise InputError(
            f"--devices must name different GPUs out of the {len(visible)} visible ones "
            f"({' '.join(visible) or 'none'}), got {' '.join(devices)}."
        )
    elif on_cpu:
        raise InputError(f"--devices: the run {on_cpu[0]} has `use_cpu: true`, so it would not use a GPU.")


def check_output_dir(study: Study) -> None:
    """
    Raises:
        `InputError`: If the folder holds the results of another study.
    """
    path = study.output_dir / "results.json"
    other = read_json(path).get("study_file", study.path) if path.is_file() else study.path
    if Path(other).name != Path(study.path).name:
        raise InputError(
            f"`output_dir` {study.output_dir} holds the results of {other}: use another folder, or move {path} away."
        )


def _write(study: Study, runs: list[Run], failures: dict[Run, str]) -> None:
    results = collect_results(study, runs, failures)
    write_json(study.output_dir / "results.json", results)
    write_text(study.output_dir / "report.html", render_report(results))
