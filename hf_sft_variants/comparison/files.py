"""What is in a run's folder."""

import json
from pathlib import Path
from typing import Any


# What the study asks of the run; the recipe as trained; the output of its process
RUN_FILE, RECIPE_FILE, LOG_FILE = "run.json", "recipe.yaml", "log.txt"
# There as soon as the run is trained, and as soon as it is evaluated
TRAINING_FILE, EVALUATION_FILE = "training.json", "evaluation.json"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A process that is killed leaves the old file or the new one, never a part."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
