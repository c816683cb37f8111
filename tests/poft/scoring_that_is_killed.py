"""`hf-sft-variants score` on two processes, the first of which may kill itself before one of its batches."""

import json
import os
import signal
from contextlib import redirect_stdout
from pathlib import Path

import torch

from hf_sft_variants.cli import main
from hf_sft_variants.scoring import LogProbScorer, shards


def score(folder: str, command: str, last: str) -> None:
    """The words of the command are JSON; each process prints to a file. `last` numbers the fatal batch, from 1."""
    os.chdir(folder)
    shards.BATCHES_PER_SHARD = 1
    LogProbScorer.__call__ = count_batches(LogProbScorer.__call__, int(last))
    with open(f"printed_by_process_{os.environ['RANK']}", "w") as file, redirect_stdout(file):
        assert main(json.loads(command)) == 0


def count_batches(score_batch, last):
    def scored(self, examples):
        assert torch.distributed.get_world_size() == 2
        rank = torch.distributed.get_rank()
        with Path(f"batches_of_process_{rank}").open("a") as file:
            file.write(f"{len(examples)}\n")
        if rank == 0 and len(Path("batches_of_process_0").read_text().splitlines()) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return score_batch(self, examples)

    return scored
