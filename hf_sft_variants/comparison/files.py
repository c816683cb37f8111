"""Files in a run's folder."""

import json
from pathlib import Path
from typing import Any

from ..files import write_text


# What the study asks of the run; the recipe it trains; the output of its process
RUN_FILE, RECIPE_FILE, LOG_FILE = "run.json", "recipe.yaml", "log.txt"
# There once the run is trained, and once it is evaluated
TRAINING_FILE, EVALUATION_FILE = "training.json", "evaluation.json"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write one line for each key, and one for each item of a list."""
    lines = [f"{_dump(key)}: {_dump_lines(value)}" for key, value in values.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _dump_lines(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(map(_dump, value)) + "\n]"
    return _dump(value)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
