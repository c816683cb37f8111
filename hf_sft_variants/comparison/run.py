"""
The process of one run: train its recipe, record what that costs, and evaluate the model.

    python -m hf_sft_variants.comparison.run FOLDER
"""

import copy
import math
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import yaml
from accelerate.utils import release_memory
from transformers import TrainerCallback

from ..errors import InputError
from ..evaluation.tagged_answers import ANSWER_TAGS, THINKING_TAGS
from ..launch.loading import load_model_and_tokenizer
from ..launch.recipe import apply_recipe, build_trainer, model_options, parse_flags, save, trainer_and_parser
from ..launch.recipe_checks import read_mapping
from .budgets import models_trained, resolve_budget, steps_of_tokens
from .evaluations import evaluate_model
from .files import EVALUATION_FILE, LOG_FILE, RECIPE_FILE, RUN_FILE, TRAINING_FILE, read_json, write_json, write_text
from .machine import describe_machine, package_versions, peak_memory


def main(argv: list[str] | None = None) -> None:
    """Train and evaluate the run of a folder, whose path is the only argument."""
    (folder,) = sys.argv[1:] if argv is None else argv
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        do_run(Path(folder))
    except InputError as error:
        sys.exit(f"error: {error}")


def _end_with_parent() -> None:
    """The parent holds the other end of stdin, which closes when it is gone, however it was stopped."""
    sys.stdin.read()
    os._exit(1)


def do_run(folder: Path) -> None:
    """Do whatever is missing of the training and the evaluation."""
    run = read_json(folder / RUN_FILE)
    if not (folder / TRAINING_FILE).is_file():
        _clear(folder)
        train(folder, run)
        release_memory()
    path = folder / EVALUATION_FILE
    if not path.is_file() or read_json(path)["settings"] != run["evaluations"]:
        evaluate(folder, run["evaluations"])


def _clear(folder: Path) -> None:
    """Remove what an interrupted run has left."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (RUN_FILE, LOG_FILE):
            path.unlink()


def train(folder: Path, run: dict[str, Any]) -> None:
    """Train the run's recipe for its budget, save the model, and record what it cost."""
    datasets.disable_caching()  # every run prepares its own data, or the first one would seem slow
    recipe, (kind, amount) = run["recipe"], resolve_budget(run["budget"], folder)
    if kind == "steps":
        recipe = {**recipe, "max_steps": amount}
    trainer_class, parsed = parse_run(recipe, str(folder / RECIPE_FILE))
    start = time.perf_counter()
    trainer = build_trainer(trainer_class, *parsed)
    if kind == "tokens":
        trainer.args.max_steps = steps_of_tokens(amount, trainer)
        recipe = {**recipe, "max_steps": trainer.args.max_steps}
    write_text(folder / RECIPE_FILE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    clock = _StartClock()
    trainer.add_callback(clock)
    trainer.train()
    tokens = max(log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log)
    costs = {
        "steps": trainer.state.global_step,
        "seconds": time.perf_counter() - start,
        "seconds_before_training": clock.time - start,
        "tokens": tokens * models_trained(trainer.args),
        **peak_memory(trainer.args.device),
        "machine": describe_machine(trainer.args.device),
        "versions": package_versions(),
        "log_history": [_without_infinities(log) for log in trainer.state.log_history],
    }
    save(trainer, parsed[0])
    write_json(folder / TRAINING_FILE, costs)


def _without_infinities(log: dict[str, Any]) -> dict[str, Any]:
    """JSON has neither infinities nor NaN."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in log.items()}


def evaluate(folder: Path, settings: dict[str, Any]) -> None:
    """Evaluate the saved model, loaded with the recipe's options."""
    recipe = folder / RECIPE_FILE
    _, (_, training_args, model_args, _) = parse_run(read_mapping(str(recipe)), str(recipe))
    options = model_options(model_args, training_args.trust_remote_code) | (training_args.model_init_kwargs or {})
    model, tokenizer = load_model_and_tokenizer(str(folder), None, str(training_args.device), options)
    tags = (
        getattr(training_args, "thinking_tags", THINKING_TAGS),
        getattr(training_args, "answer_tags", ANSWER_TAGS),
    )
    evaluated = evaluate_model(model, tokenizer, settings, *tags)
    write_json(folder / EVALUATION_FILE, {"settings": settings, **evaluated})


def parse_run(recipe: dict[str, Any], source: str) -> tuple:
    """The trainer class of a recipe, and its parsed arguments."""
    trainer_class, parser = trainer_and_parser(recipe.get("module"))
    apply_recipe(parser, copy.deepcopy(recipe), source)
    return trainer_class, parse_flags(parser, [])


class _StartClock(TrainerCallback):
    """When training proper began: a reference that is trained first has callbacks of its own."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.time = time.perf_counter()


if __name__ == "__main__":
    main()
