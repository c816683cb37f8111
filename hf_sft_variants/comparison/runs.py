"""Training what is missing of a study, each run in a process of its own, several at once."""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from subprocess import Popen

from tqdm.auto import tqdm

from .files import RUN_FILE, TRAINING_FILE, write_json
from .plan import Run, description
from .process import last_lines, start_process


def do_missing_runs(
    runs: list[Run], devices: list[str | None], on_change: Callable[[dict[Run, str]], None]
) -> dict[Run, str]:
    """
    Train and evaluate the runs that are not finished, as many at once as there are devices.

    A run begins when those it needs are trained; one that fails stops no other that does not need it. However this
    process ends, its runs end with it.

    Args:
        runs (`list[Run]`):
            All runs of a study.
        devices (`list[str | None]`):
            For each of the runs at once, the one GPU it sees, or `None`.
        on_change (`Callable`):
            Called with the failures so far whenever a run has ended.

    Returns:
        `dict[Run, str]`: Why a run failed.
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
