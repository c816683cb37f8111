"""Another process, with the libraries loaded: it runs functions in forks of itself, each of which may be killed."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name


class OtherProcess:
    """Starts the process, whose string hashes differ from this one's."""

    def __init__(self, *folders: Path):
        paths = os.pathsep.join(map(str, (*folders, Path(__file__).parent, Path(__file__).parents[1])))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONHASHSEED": "7"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, function, *arguments, forks: int = 1) -> int:
        """
        Call a function of a module in one fork, or in several that `torch.distributed` can connect.

        Returns 0, or how the first fork to fail has ended: 1 after an exception, or the negative number of a signal.
        """
        name = f"{function.__module__}:{function.__name__}"
        self.process.stdin.write(json.dumps([forks, name, *map(str, arguments)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def run_in_forks(forks: int, name: str, *arguments: str) -> int:
    """As torchrun does, end the others when one fails."""
    port, processes, result = free_port(), set(), 0
    for rank in range(forks):
        process = os.fork()
        if not process:
            run_here(connection(rank, forks, port) if forks > 1 else {}, name, *arguments)
        processes.add(process)
    while processes:
        process, status = os.wait()
        processes.remove(process)
        if status and not result:
            result = os.waitstatus_to_exitcode(status)
            for other in processes:
                os.kill(other, signal.SIGKILL)
    return result


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def connection(rank: int, number: int, port: int) -> dict[str, str]:
    """What torchrun sets for one of its processes."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    return {key: str(value) for key, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}


def run_here(environment: dict[str, str], name: str, *arguments: str) -> None:
    os.environ |= environment
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stdout is for the answer
    try:
        resolve_name(name)(*arguments)
        sys.stdout.flush()
        os._exit(0)
    finally:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def serve() -> None:
    import gc

    import datasets
    import torch

    import hf_sft_variants

    [getattr(hf_sft_variants, name) for name in hf_sft_variants.__all__]
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    gc.freeze()  # or each fork would go through the imports' objects whenever it collects garbage
    for line in sys.stdin:
        sys.stdout.write(f"{run_in_forks(*json.loads(line))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
