"""
What a run's process does: train its recipe, measure what that costs, and evaluate the model.

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
from .budgets import amount_of, steps_of_seconds, steps_of_tokens
from .costs import extra_passes, peak_memory
from .evaluations import evaluate_model
from .files import EVALUATION_FILE, LOG_FILE, RECIPE_FILE, RUN_FILE, TRAINING_FILE, read_json, write_json, write_text
from .machine import describe_machine, package_versions


# What a run that begins anew keeps; the recipe says how many steps the budget was found to be
KEPT = (RUN_FILE, RECIPE_FILE, LOG_FILE)


def main(argv: list[str] | None = None) -> None:
    """
    Train and evaluate the run of a folder; what is done already is not done again.

    Args:
        argv (`list[str]`, *optional*, defaults to `sys.argv[1:]`):
            The folder, in which the study has written what the run is.
    """
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
    """Whatever of the training and the evaluation is missing."""
    run = read_json(folder / RUN_FILE)
    if not (folder / TRAINING_FILE).is_file():
        _clear(folder)
        train(folder, run)
        release_memory()
    if run["evaluations"] is not None:
        evaluate(folder, run)


def _clear(folder: Path) -> None:
    """Remove what a run left that was stopped."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in KEPT:
            path.unlink()


def train(folder: Path, run: dict[str, Any]) -> None:
    """Train the run's recipe for its budget, save the model, and write down what it cost."""
    datasets.disable_caching()  # every run prepares its data itself, or the first one would seem slow
    recipe, kind, amount = run["recipe"], *amount_of(run["budget"], folder)
    has_begun_before = (folder / RECIPE_FILE).is_file()
    if has_begun_before:
        recipe = read_mapping(str(folder / RECIPE_FILE))
    elif kind == "steps":
        recipe = {**recipe, "max_steps": amount}
    elif kind == "seconds":
        recipe = {**recipe, "max_steps": steps_of_seconds(amount, folder, run)}

    trainer_class, parsed = _parse(recipe, str(folder / RECIPE_FILE))
    start = time.perf_counter()
    trainer = build_trainer(trainer_class, *parsed)
    built = time.perf_counter()
    if kind == "tokens" and not has_begun_before:
        trainer.args.max_steps = steps_of_tokens(amount, trainer)
        recipe = {**recipe, "max_steps": trainer.args.max_steps}
    write_text(folder / RECIPE_FILE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    clock = _StartClock()
    trainer.add_callback(clock)
    trainer.train()
    costs = {
        "steps": trainer.state.global_step,
        "seconds": time.perf_counter() - start,
        "seconds_preparing": built - start,
        "seconds_before_training": clock.time - start,
        "tokens": max(log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log),
        **peak_memory(trainer.args.device),
        "extra_passes": extra_passes(trainer),
        "machine": describe_machine(trainer.args.device),
        "versions": package_versions(),
        "log_history": [_without_infinities(log) for log in trainer.state.log_history],
    }
    save(trainer, parsed[0])
    write_json(folder / TRAINING_FILE, costs)


def _without_infinities(log: dict[str, Any]) -> dict[str, Any]:
    """JSON has no word for them, nor for NaN."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in log.items()}


def evaluate(folder: Path, run: dict[str, Any]) -> None:
    """
    Evaluate the saved model, loaded as the recipe says: as it was trained, and the same whenever that is done.
    """
    settings, path = run["evaluations"], folder / EVALUATION_FILE
    if path.is_file() and read_json(path)["settings"] == settings:
        return
    _, (_, training_args, model_args, _) = _parse(read_mapping(str(folder / RECIPE_FILE)), str(folder / RECIPE_FILE))
    options = model_options(model_args, training_args.trust_remote_code) | (training_args.model_init_kwargs or {})
    model, tokenizer = load_model_and_tokenizer(str(folder), None, str(training_args.device), options)
    tags = (
        getattr(training_args, "thinking_tags", THINKING_TAGS),
        getattr(training_args, "answer_tags", ANSWER_TAGS),
    )
    write_json(path, {"settings": settings, **evaluate_model(model, tokenizer, settings, *tags)})


def _parse(recipe: dict[str, Any], source: str) -> tuple:
    trainer_class, parser = trainer_and_parser(recipe.get("module"))
    apply_recipe(parser, copy.deepcopy(recipe), source)
    return trainer_class, parse_flags(parser, [])


class _StartClock(TrainerCallback):
    """When the training proper began: a reference that is trained before has callbacks of its own."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.time = time.perf_counter()


if __name__ == "__main__":
    main()
