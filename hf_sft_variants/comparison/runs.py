"""Training what is missing of a study, each run in a process of its own, several at once."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from subprocess import Popen

from tqdm.auto import tqdm

from .files import LOG_FILE, RUN_FILE, TRAINING_FILE, write_json
from .plan import Run, description


def do_missing_runs(
    runs: list[Run], devices: list[str | None], on_change: Callable[[dict[Run, str]], None]
) -> dict[Run, str]:
    """
    Train and evaluate the runs that are not finished, as many at once as there are devices.

    A run starts once the runs it needs are trained. One that fails stops only those that need it. However this process
    ends, its runs end with it.

    Args:
        runs (`list[Run]`):
            All runs of a study.
        devices (`list[str | None]`):
            The GPU that each of the runs at once sees, or `None` for all.
        on_change (`Callable`):
            Called with the failures so far whenever a run has ended.

    Returns:
        `dict[Run, str]`: Why runs failed.
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
