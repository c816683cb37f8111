"""What a run was trained on, and the memory it took."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


PACKAGES = ("hf_sft_variants", "torch", "transformers", "trl", "peft", "datasets", "accelerate")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """CPU, memory, operating system and, if the device is one, the visible GPUs."""
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(num_gpus)],
        "os": platform.platform(),
    }


def package_versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Peak memory of this process: allocated on a CUDA device, or resident on the CPU."""
    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "memory_kind": "allocated on the GPU"}
    return {"peak_memory_bytes": _peak_resident_bytes(), "memory_kind": "resident on the CPU"}


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # `ru_maxrss` includes what the parent held when it started this process
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 2**10
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
