"""Budgets as optimizer steps, which are known before training: the learning-rate schedule is whole."""

import math
import shutil
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from trl import SFTTrainer

from ..errors import InputError
from .files import RUN_FILE, TRAINING_FILE, read_json, write_json
from .process import last_lines, start_process


# Steps of runs whose times tell a step's from what comes before: the first, and the first of the others that takes
# longer by so many seconds, beside which the noise of starting is small
FEW_STEPS, MANY_STEPS, ENOUGH_SECONDS = 4, (12, 48, 192), 10.0


def amount_of(budget: dict[str, Any], folder: Path) -> tuple[str | None, float | None]:
    """
    What a budget is an amount of, and the amount; that of another arm is what its run took.

    Args:
        budget (`dict[str, Any]`):
            As [`~hf_sft_variants.comparison.study.Arm`] has it.
        folder (`Path`):
            The run's folder, beside which that of the other arm is.
    """
    if not budget:
        return None, None
    ((kind, amount),) = budget.items()
    if not kind.endswith("_of"):
        return kind, amount
    kind = kind.removesuffix("_of")
    return kind, read_json(folder.parent.parent / amount / folder.name / TRAINING_FILE)[kind]


def steps_of_tokens(tokens: float, trainer: SFTTrainer) -> int:
    """
    Number of optimizer steps whose tokens, padding aside, come nearest to a number; at least one.

    Args:
        tokens (`float`):
            The number.
        trainer ([`~trl.SFTTrainer`]):
            Has prepared the data.

    Raises:
        `InputError`: If the data is a stream, whose tokens can't be counted beforehand.
    """
    if isinstance(trainer.train_dataset, IterableDataset):
        raise InputError("a budget of `tokens` counts the data beforehand, but it is a stream: give `steps`.")
    tokens_per_epoch = sum(map(len, trainer.train_dataset["input_ids"]))
    steps_per_epoch = math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps)
    return max(round(tokens / tokens_per_epoch * steps_per_epoch), 1)


def steps_of_seconds(seconds: float, folder: Path, run: dict[str, Any]) -> int:
    """
    Number of optimizer steps for which a run takes a time, found by short runs that are thrown away.

    Args:
        seconds (`float`):
            The time, with all that comes before the first step.
        folder (`Path`):
            The run's folder.
        run (`dict[str, Any]`):
            What the folder says about the run.

    Raises:
        `InputError`: If what comes before the first step takes longer.
    """
    few = FEW_STEPS
    preparing, of_few = _seconds_of_steps(few, folder, run)
    for many in MANY_STEPS:
        _, of_many = _seconds_of_steps(many, folder, run)
        if of_many - of_few >= ENOUGH_SECONDS:
            break
    shutil.rmtree(folder / "calibration", ignore_errors=True)
    per_step = (of_many - of_few) / (many - few)  # a reference that is trained first has its share in it
    fixed = preparing + of_few - few * per_step
    if per_step <= 0:
        raise InputError(
            f"{few} steps took {of_few:.2f} s and {many} steps {of_many:.2f} s, which says nothing about the time of "
            "a step: the machine has other work, or the model is too small. Give a budget of `steps`."
        )
    if fixed + per_step > seconds:
        raise InputError(
            f"the budget is {seconds:.1f} s, but what comes before the first step takes {fixed:.1f} s and a step "
            f"{per_step:.2f} s: give it more time."
        )
    return int((seconds - fixed) / per_step)


def _seconds_of_steps(steps: int, folder: Path, run: dict[str, Any]) -> tuple[float, float]:
    """
    Seconds of loading and scoring, and of what `train()` does, in a process of its own: what it holds in memory must
    not count as the run's.
    """
    calibration = folder / "calibration" / f"steps_{steps}"
    calibration.mkdir(parents=True)
    recipe = {**run["recipe"]}
    for key in ("output_dir", "score_cache_dir"):
        if key in recipe:
            recipe[key] = recipe[key].replace(str(folder), str(calibration))
    write_json(calibration / RUN_FILE, {**run, "recipe": recipe, "budget": {"steps": steps}, "evaluations": None})
    if start_process(calibration).wait() != 0:
        raise InputError(f"a run of {steps} steps, to learn how long one takes, failed:\n{last_lines(calibration)}")
    costs = read_json(calibration / TRAINING_FILE)
    return costs["seconds_preparing"], costs["seconds"] - costs["seconds_preparing"]
