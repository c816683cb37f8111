"""Another process, with the libraries loaded: it runs functions in forks of itself, each of which may be killed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name


class OtherProcess:
    """Starts the process, with other hashes of texts than this one's."""

    def __init__(self, *folders: Path):
        paths = os.pathsep.join(map(str, (*folders, Path(__file__).parent, Path(__file__).parents[1])))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONHASHSEED": "7"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, function, *arguments) -> int:
        """Calls a function of a module; returns 0, 1 after an exception, or the negative number of a signal."""
        name = f"{function.__module__}:{function.__name__}"
        self.process.stdin.write(json.dumps([name, *map(str, arguments)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def run_in_fork(name: str, *arguments: str) -> int:
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stdout is for the answer
    try:
        resolve_name(name)(*arguments)
        os._exit(0)
    finally:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def serve() -> None:
    import datasets
    import torch

    import hf_sft_variants

    [getattr(hf_sft_variants, name) for name in hf_sft_variants.__all__]
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    for line in sys.stdin:
        sys.stdout.write(f"{run_in_fork(*json.loads(line))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
