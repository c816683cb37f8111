"""The data of a run prepared with the cache of `datasets`; as a script, a second start in a process of its own."""

import sys
from pathlib import Path


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
from datasets import Dataset
from helpers import make_trainer
from methods import METHODS
from transformers import AutoModelForCausalLM, AutoTokenizer


def prepare(method: str, folder: Path, **options):
    """
    A trainer on the rows, the model and the tokenizer in a folder; data is cached in a folder of the method's own.
    """
    rows = Dataset.from_json(str(folder / "rows.jsonl"), cache_dir=str(folder / method))
    model, tokenizer = (
        auto_class.from_pretrained(folder / "model") for auto_class in (AutoModelForCausalLM, AutoTokenizer)
    )
    options = {"max_length": 200, "eval_dataset": rows.select(range(4)), **METHODS[method].options, **options}
    return make_trainer(*METHODS[method].classes, model, tokenizer, rows, folder / "run", **options)


def cache_files(method: str, folder: Path) -> dict[str, int]:
    """When each cached file was written."""
    return {str(path): path.stat().st_mtime_ns for path in (folder / method).rglob("*.arrow")}


if __name__ == "__main__":
    datasets.disable_progress_bars()
    for method in METHODS:
        prepare(method, Path(sys.argv[1]))
