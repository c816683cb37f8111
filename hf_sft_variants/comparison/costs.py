"""What a run cost beside its time: the memory it took, and passes that plain fine-tuning does not have."""

import sys
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from ..poft import PoFTTrainer
from ..sft_go import SFTGOTrainer
from ..sftkey import SFTKeyTrainer
from ..sftmix import SFTMixTrainer


def peak_memory(device: torch.device) -> dict[str, Any]:
    """The most memory this process has held: allocated on a CUDA device, or resident on the CPU."""
    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "memory_kind": "allocated on the GPU"}
    return {"peak_memory_bytes": _peak_resident_bytes(), "memory_kind": "resident on the CPU"}


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # `ru_maxrss` counts what the parent held when it started this process
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 2**10
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10


def extra_passes(trainer: SFTTrainer) -> str:
    """In words, what a method does with the data beside the passes of training."""
    args = trainer.args
    if isinstance(trainer, PoFTTrainer):
        return _scored_by(len(args.reference_models or [])) if args.needs_references else "none"
    if isinstance(trainer, SFTGOTrainer):
        return _scored_by(1) if args.group_by in ("llmlingua2", "rho1") else "none"
    if isinstance(trainer, SFTMixTrainer):
        if not args.needs_reference:
            return "none"
        evaluations = len(args.confidence_checkpoints) if args.confidence_checkpoints else "3 or more"
        return f"a reference is trained as long, and evaluated on the data {evaluations} times"
    return "none" if isinstance(trainer, SFTKeyTrainer) or type(trainer) is SFTTrainer else "not known"


def _scored_by(models: int) -> str:
    if models == 0:
        return "none"  # the scores came with the data, or from a file
    return f"{models} model{'s' if models > 1 else ''} read{'s' if models == 1 else ''} the data once"
