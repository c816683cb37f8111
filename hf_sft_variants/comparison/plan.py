"""Plans the runs of a study: one for each arm, data set and seed, with the recipe it trains."""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from ..errors import InputError
from ..evaluation import check_dataset, check_tagged_dataset, numeric_answers
from ..launch.parsing import parse_recipe, trainer_and_parser
from ..launch.recipe_checks import check_keys, error_in, key_types, nearest, read_mapping
from ..launch.training import load_data
from .evaluations import load_evaluation_data
from .files import EVALUATION_FILE, RUN_FILE, TRAINING_FILE, read_json
from .lm_eval_tasks import check_tasks
from .study import OTHER_RUN, Arm, Study, texts_in


# The study sets these itself
RESERVED_KEYS = ("module", "output_dir", "seed")
# Options of `accelerate launch` that change nothing where a run is one process
LAUNCH_OPTIONS = {
    "num_processes": 1,
    "num_machines": 1,
    "mixed_precision": "no",
    "dynamo_backend": "no",
    "num_cpu_threads_per_process": None,
}


@dataclass(frozen=True, eq=False)
class Run:
    """
    Training and evaluation of an arm on a data set with a seed. `recipe` is the arm's with all overrides, for
    `trl sft`, and `budget` as in [`~hf_sft_variants.comparison.study.Arm`]; `folder` has its model and results, and
    `others` are the folders of the runs that it needs. `training_rows` is a hash of its training rows, `None` for a
    stream.
    """

    arm: str
    data: str
    seed: int
    folder: Path
    recipe: dict[str, Any]
    budget: dict[str, Any]
    evaluations: dict[str, Any]
    others: tuple[Path, ...]
    training_rows: str | None = None

    def __str__(self):
        return f"{self.arm} on {self.data}, seed {self.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether it is trained, and evaluated as the study now asks."""
        is_trained, path = (self.folder / TRAINING_FILE).is_file(), self.folder / EVALUATION_FILE
        return is_trained and path.is_file() and read_json(path)["settings"] == self.evaluations


def plan_runs(study: Study) -> list[Run]:
    """
    All runs of a study, checked as far as possible without training. Raises an `InputError` if a recipe, a data set or
    the content of a run's folder can't be used.
    """
    runs = []
    for data in study.data:
        evaluations = evaluations_on(study, data)
        evaluations["rows"] = check_evaluations(evaluations)
        for arm in study.arms.values():
            where = f"{study.path}, arm `{arm.name}` on data `{data}`"
            recipe = merged_recipe(study, arm, data, where)
            arm_runs = [make_run(study, arm, data, seed, recipe, evaluations) for seed in study.seeds]
            # The check of one seed holds for all, unless each has its own data
            checked = arm_runs if "{seed}" in str(recipe.get("dataset_name")) else arm_runs[:1]
            hashes = [check_recipe(run.recipe, where) for run in checked]
            runs += [replace(run, training_rows=hashes[i % len(hashes)]) for i, run in enumerate(arm_runs)]
    for run in runs:
        check_folder(run)
    # One seed of every arm first, so that a study that is stopped early is already of use
    return sorted(runs, key=lambda run: study.seeds.index(run.seed))


def make_run(study, arm: Arm, data: str, seed: int, recipe: dict, evaluations: dict) -> Run:
    folders = study.output_dir / "runs" / data
    folder = folders / arm.name / f"seed_{seed}"
    placeholders = {"{runs}": str(folders), "{folder}": str(folder), "{data}": data, "{seed}": str(seed)}
    recipe = {**filled_in(recipe, placeholders), "seed": seed, "output_dir": str(folder)}
    others = tuple(folders / other / folder.name for other in sorted(arm.others()))
    return Run(arm.name, data, seed, folder, recipe, arm.budget, evaluations, others)


def merged_recipe(study: Study, arm: Arm, data: str, where: str) -> dict[str, Any]:
    """The arm's recipe without launch options, with the overrides of the study, the data and the arm."""
    recipe = read_mapping(arm.recipe)
    _, parser = trainer_and_parser(recipe.get("module"))
    check_keys(parser, recipe)
    known = key_types(parser)
    for key in [key for key in recipe if key not in known and key not in ("module", "env")]:
        value = recipe.pop(key)
        if key not in LAUNCH_OPTIONS or LAUNCH_OPTIONS[key] not in (None, value):
            raise InputError(
                f"{arm.recipe} launches with `{key}: {value}`, but a run of a study is one process on one device: use "
                "a copy of the recipe without it."
            )
    for overrides in (study.overrides, study.data[data], arm.overrides):
        for key in overrides:
            if key in RESERVED_KEYS:
                raise InputError(f"{where}: `{key}` is set by the study itself. Remove it from the overrides.")
            if key not in known:
                raise InputError(f"{where}: unknown key `{key}`" + nearest(key, known))
        recipe |= overrides
    if "score_cache_dir" in known:
        recipe.setdefault("score_cache_dir", "{folder}/scores")  # so that each run's time includes its scoring
    for text in texts_in(recipe):
        if "{runs}" in OTHER_RUN.sub("", text) or not set(OTHER_RUN.findall(text)) <= arm.others():
            raise InputError(
                f"{where}: {text!r} must name another arm's run as `{{runs}}/ARM/seed_{{seed}}`, in the arm's own "
                "`overrides`."
            )
    return recipe


def check_recipe(recipe: dict[str, Any], where: str) -> str | None:
    """
    Check that a recipe parses and its data set loads; returns the hash of its training rows, `None` for a stream.
    """
    recipe = {key: value for key, value in recipe.items() if key != "env"}  # not for this process
    with error_in(where):
        _, (script_args, _, _, dataset_args) = parse_recipe(recipe)
        train_dataset, _ = load_data(script_args, dataset_args)
        return hash_of_rows(train_dataset)


def evaluations_on(study: Study, data: str) -> dict[str, Any]:
    """The study's evaluations with the data set that they use."""
    evaluations = dict(study.evaluations)
    if evaluations["dataset_name"] is None:
        keys = ("dataset_name", "dataset_config")
        evaluations |= {key: study.data[data].get(key, evaluations[key]) for key in keys}
    evaluations = filled_in(evaluations, {"{data}": data})
    if "{seed}" in evaluations["dataset_name"]:
        raise InputError(
            f"{study.path}: all seeds are evaluated on the same rows, but data `{data}` has `{{seed}}` in its name: "
            "give `dataset_name` in `evaluations`."
        )
    return evaluations


def check_evaluations(evaluations: dict[str, Any]) -> str | None:
    """Check that the evaluation data and tasks can be used; returns the hash of the data's rows."""
    dataset = load_evaluation_data(evaluations)
    if evaluations["tagged"]:
        check_tagged_dataset(dataset)
    else:
        check_dataset(dataset, ("prompt", "completion"))
        if "answer" in dataset.column_names and evaluations["max_new_tokens"] is not None:
            numeric_answers(dataset)
    for name, pattern in (evaluations["parts"] or {}).items():
        responses = [] if evaluations["tagged"] else dataset["completion"]
        if not any(re.search(pattern, response[-1]["content"]) for response in responses):
            raise InputError(
                f"`evaluations`: `parts` has {pattern!r} for `{name}`, which matches no `completion` of the data: "
                "correct it. Tagged responses can't be divided into parts."
            )
    if evaluations["lm_eval"] is not None:
        check_tasks(evaluations["lm_eval"]["tasks"], evaluations["lm_eval"]["include_path"])
    return hash_of_rows(dataset)


def hash_of_rows(dataset: Dataset | IterableDataset) -> str | None:
    """Hash of the rows in their order, however they are stored."""
    if isinstance(dataset, IterableDataset):
        return None
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for batch in table.replace_schema_metadata().combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()[:16]


def check_folder(run: Run) -> None:
    """Raise an `InputError` if the run's folder holds other files, or the run with other settings or data."""
    if not run.folder.is_dir() or all(path.suffix == ".partial" for path in run.folder.iterdir()):
        return
    if not (run.folder / RUN_FILE).is_file():
        raise InputError(
            f"{run.folder} should hold the run {run}, but has other files: remove them, or use another `output_dir`."
        )
    before, now = read_json(run.folder / RUN_FILE), json.loads(json.dumps(description(run)))
    keys = {**before["recipe"], **now["recipe"]}
    different = [f"`{key}`" for key in keys if before["recipe"].get(key) != now["recipe"].get(key)]
    others = {"budget": "`budget`", "training_rows": "the rows of its data set"}
    different += [words for key, words in others.items() if before[key] != now[key]]
    if different:
        raise InputError(
            f"{run.folder} holds the run {run} with other settings: {', '.join(different)}. "
            "Remove the folder to train it again, or choose another `output_dir`."
        )


def description(run: Run) -> dict[str, Any]:
    """Content of [`RUN_FILE`]."""
    names = ("arm", "data", "seed", "recipe", "budget", "evaluations", "training_rows")
    return {name: getattr(run, name) for name in names}


def filled_in(value: Any, texts: dict[str, str]) -> Any:
    """A YAML value with its placeholders replaced, however deeply nested."""
    if isinstance(value, dict):
        return {key: filled_in(item, texts) for key, item in value.items()}
    if isinstance(value, list):
        return [filled_in(item, texts) for item in value]
    if isinstance(value, str):
        for placeholder, text in texts.items():
            value = value.replace(placeholder, text)
    return value
