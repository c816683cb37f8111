"""Trains what is missing of a study, each run in its own process, several at once."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from subprocess import Popen

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..errors import InputError
from ..files import write_text
from .files import LOG_FILE, RUN_FILE, TRAINING_FILE, read_json, write_json
from .plan import Run, description, plan_runs
from .report import render_report
from .results import collect_results
from .study import Study, read_study


def compare_study(
    path: str,
    devices: list[str | None] | None = None,
    seeds: list[int] | None = None,
    flags: list[str] | None = None,
) -> tuple[dict[Run, str], Path]:
    """
    Do what is missing of a study, writing `results.json` and `report.html` to its folder after every run. `devices`
    has, for each of the runs to train at once, the GPU that it sees, or `None` for all; by default one run is trained
    at a time. `seeds` and `flags` change the study as in [`read_study`]. Returns the runs that failed with the
    reasons, and the path of the report. Raises an `InputError` if the study or anything it names can't be used, or it
    is running already.
    """
    devices = devices or [None]
    study = read_study(path, seeds, flags)
    results_path, report_path = study.output_dir / "results.json", study.output_dir / "report.html"
    _check_results(results_path, study)
    runs = plan_runs(study)
    check_devices(devices, runs)
    study.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(study.output_dir / ".lock", timeout=0):
            write = partial(_write_results, study, runs, results_path, report_path)
            write({})
            failures = do_missing_runs(runs, devices, write)
            write(failures)
    except Timeout as error:
        raise InputError(f"`output_dir` {study.output_dir} is in use: this study is running already.") from error
    return failures, report_path


def check_devices(devices: list[str | None], runs: list[Run]) -> None:
    """
    Raise an `InputError` if a run would see several GPUs, a GPU asked for is not visible or named twice, or a run that
    is given one uses the CPU.
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


def _check_results(path: Path, study: Study) -> None:
    other = read_json(path).get("study_file", study.path) if path.is_file() else study.path
    if Path(other).name != Path(study.path).name:
        raise InputError(
            f"`output_dir` {study.output_dir} holds the results of {other}: use another folder, or move {path} away."
        )


def _write_results(
    study: Study, runs: list[Run], results_path: Path, report_path: Path, failures: dict[Run, str]
) -> None:
    results = collect_results(study, runs, failures)
    write_json(results_path, results)
    write_text(report_path, render_report(results))


def do_missing_runs(
    runs: list[Run], devices: list[str | None], on_change: Callable[[dict[Run, str]], None]
) -> dict[Run, str]:
    """
    Train and evaluate the runs that are not finished, as many at once as there are `devices`; returns the runs that
    failed with the reasons. A run starts once the runs it needs are trained; one that fails stops only those that need
    it. However this process ends, its runs end with it. `on_change` is called with the failures so far whenever a run
    has ended.
    """
    waiting = [run for run in runs if not run.is_finished]
    failures: dict[Run, str] = {}
    running: dict[Future, tuple[Run, Popen, str | None]] = {}
    free = list(devices)
    with (
        ThreadPoolExecutor(len(devices)) as executor,
        tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run", desc="Runs") as progress,
    ):
        try:
            while waiting or running:
                for run in [run for run in waiting if _is_ready(run)][: len(free)]:
                    waiting.remove(run)
                    process, device = _start(run, free[0]), free.pop(0)
                    running[executor.submit(process.wait)] = (run, process, device)
                if not running:
                    failures |= dict.fromkeys(waiting, "a run that it needs has failed")
                    break
                progress.set_postfix_str("; ".join(str(run) for run, *_ in running.values()))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run, _, device = running.pop(future)
                    free.append(device)
                    if future.result() != 0:
                        failures[run] = f"exit status {future.result()}\n{last_lines(run.folder)}"
                    progress.update()
                    on_change(failures)
            progress.set_postfix_str("")
        finally:
            for _, process, _ in running.values():
                process.kill()
    return failures


def _is_ready(run: Run) -> bool:
    return all((other / TRAINING_FILE).is_file() for other in run.others)


def _start(run: Run, device: str | None) -> Popen:
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / RUN_FILE, description(run))
    return start_process(run.folder, device)


def start_process(folder: Path, device: str | None) -> Popen:
    """
    Start the run of a folder with its output in the folder's log. The process sees one of the GPUs that are visible
    here, or all if `device` is `None`. It ends with this one: it notices when its stdin closes.
    """
    environment = os.environ
    if device is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment = {**environment, "CUDA_VISIBLE_DEVICES": visible.split(",")[int(device)] if visible else device}
    command = [sys.executable, "-m", "hf_sft_variants.comparison.run", str(folder)]
    with open(folder / LOG_FILE, "w", encoding="utf-8") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment)


def last_lines(folder: Path, number: int = 12) -> str:
    """The end of a run's log, indented."""
    text = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line for line in text.split("\n") if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-number:])
