"""What a run was trained on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


PACKAGES = ("hf_sft_variants", "torch", "transformers", "trl", "peft", "datasets", "accelerate")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The GPUs that are visible are named if the device is one of them."""
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


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
