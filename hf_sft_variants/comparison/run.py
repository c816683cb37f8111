"""
The process of one run: train its recipe, record what that costs, and evaluate the model.

    python -m hf_sft_variants.comparison.run FOLDER
"""

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
from datasets import IterableDataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..errors import InputError
from ..evaluation.tagged_answers import ANSWER_TAGS, THINKING_TAGS
from ..files import write_text
from ..launch.loading import load_model_and_tokenizer
from ..launch.parsing import parse_recipe
from ..launch.recipe_checks import error_in, read_mapping
from ..launch.training import build_trainer, model_options, save
from .evaluations import evaluate_model
from .files import EVALUATION_FILE, LOG_FILE, RECIPE_FILE, RUN_FILE, TRAINING_FILE, read_json, write_json
from .machine import describe_machine, package_versions, peak_memory


def main(argv: list[str] | None = None) -> None:
    """Train and evaluate the run of a folder, whose path is the only argument."""
    (folder,) = sys.argv[1:] if argv is None else argv
    threading.Thread(target=_end_with_parent, daemon=True).start()
    datasets.disable_caching()  # every run prepares its own data, or the first one would seem slow
    try:
        do_run(Path(folder))
    except InputError as error:
        sys.exit(f"error: {error}")


def _end_with_parent() -> None:
    """Exit when stdin closes, i.e. when the parent is gone, however it was stopped."""
    sys.stdin.read()
    os._exit(1)


def do_run(folder: Path) -> None:
    """Train and evaluate, unless that is done already."""
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
    recipe, (kind, amount) = run["recipe"], resolve_budget(run["budget"], folder)
    if kind == "steps":
        recipe = {**recipe, "max_steps": amount}
    with error_in(str(folder / RECIPE_FILE)):
        trainer_class, parsed = parse_recipe(recipe)
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
    """Replace infinities and NaN, which JSON does not have, with `None`."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in log.items()}


def evaluate(folder: Path, settings: dict[str, Any]) -> None:
    """Evaluate the saved model, loaded with the recipe's options."""
    with error_in(str(folder / RECIPE_FILE)):
        _, (_, training_args, model_args, _) = parse_recipe(read_mapping(folder / RECIPE_FILE))
    options = model_options(model_args, training_args.trust_remote_code) | (training_args.model_init_kwargs or {})
    model, tokenizer = load_model_and_tokenizer(str(folder), None, str(training_args.device), options)
    tags = (
        getattr(training_args, "thinking_tags", THINKING_TAGS),
        getattr(training_args, "answer_tags", ANSWER_TAGS),
    )
    evaluated = evaluate_model(model, tokenizer, settings, *tags)
    write_json(folder / EVALUATION_FILE, {"settings": settings, **evaluated})


def resolve_budget(budget: dict[str, Any], folder: Path) -> tuple[str | None, float | None]:
    """Kind and amount of a run's budget; an amount of another arm's run is read from its folder."""
    if not budget:
        return None, None
    ((kind, amount),) = budget.items()
    if not kind.endswith("_of"):
        return kind, amount
    kind = kind.removesuffix("_of")
    return kind, read_json(folder.parent.parent / amount / folder.name / TRAINING_FILE)[kind]


def steps_of_tokens(tokens: float, trainer: SFTTrainer) -> int:
    """
    Number of optimizer steps, at least one, whose tokens come nearest to `tokens`. It is known before training, so the
    learning-rate schedule is whole. Raises an `InputError` for a stream, whose tokens can't be counted beforehand.
    """
    if isinstance(trainer.train_dataset, IterableDataset):
        raise InputError("a budget of `tokens` counts the data beforehand, but it is a stream: give `steps`.")
    tokens_per_epoch = sum(map(len, trainer.train_dataset["input_ids"])) * models_trained(trainer.args)
    steps_per_epoch = math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps)
    return max(round(tokens / tokens_per_epoch * steps_per_epoch), 1)


def models_trained(args: SFTConfig) -> int:
    """2 for a method that first trains a reference for as many steps on the same data (SFTMix), else 1."""
    return 2 if getattr(args, "needs_reference", False) else 1


class _StartClock(TrainerCallback):
    """Notes when training starts; a reference that is trained before has its own callbacks."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.time = time.perf_counter()


if __name__ == "__main__":
    main()
