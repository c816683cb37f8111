"""A run as a process of its own, whose memory and time are nobody else's."""

import os
import subprocess
import sys
from pathlib import Path

from .files import LOG_FILE


def start_process(folder: Path, device: str | None = None) -> subprocess.Popen:
    """
    Start the run of a folder; its output goes to the folder's log.

    Args:
        folder (`Path`):
            Has the description of the run.
        device (`str`, *optional*):
            The one GPU that it sees, a number among those that this process sees. By default it sees them all.

    Returns:
        `subprocess.Popen`: The process, which ends with this one: it notices when its stdin closes.
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
