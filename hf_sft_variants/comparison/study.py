"""A study: arms, data sets and seeds, as its YAML file says."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..launch.recipe_checks import nearest, read_mapping


STUDY_KEYS = ("output_dir", "seeds", "baseline", "overrides", "data", "arms", "budget", "evaluations")
REQUIRED_KEYS = ("output_dir", "seeds", "baseline", "data", "arms")
ARM_KEYS = ("recipe", "overrides", "budget", "controls")
EVALUATION_DEFAULTS = {
    "dataset_name": None,
    "dataset_config": None,
    "dataset_split": "test",
    "tagged": False,
    "max_new_tokens": 128,
    "batch_size": 25,
    "lm_eval": None,
}
LM_EVAL_DEFAULTS = {"tasks": None, "limit": None, "num_fewshot": None, "include_path": None}

# What a run may spend: a number, or as much as another arm did
AMOUNTS = ("steps", "tokens", "seconds")
BUDGET_KEYS = (*AMOUNTS, *(f"{amount}_of" for amount in AMOUNTS))

# Names become folders
NAME = re.compile(r"[\w][\w.-]*")
# The run of another arm, of the same data and seed
OTHER_RUN = re.compile(r"\{runs\}/([^/{}]+)/seed_\{seed\}")


@dataclass(frozen=True)
class Arm:
    """
    What is trained.

    Attributes:
        name (`str`):
            Its name in the study.
        recipe (`str`):
            Path of a recipe of `trl sft`.
        overrides (`dict[str, Any]`):
            Keys of the recipe with other values.
        budget (`dict[str, Any]`):
            One of [`BUDGET_KEYS`] with its amount, or nothing: then the recipe says how long it trains.
        controls (`list[str]`):
            Other arms that differences are taken from, beside the baseline.
    """

    name: str
    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    controls: list[str] = field(default_factory=list)

    def others(self) -> set[str]:
        """Arms whose runs this one needs."""
        values = [value for key, value in self.budget.items() if key.endswith("_of")]
        return {*values, *(name for text in texts_in(self.overrides) for name in OTHER_RUN.findall(text))}


@dataclass(frozen=True)
class Study:
    """
    What is compared.

    Attributes:
        path (`str`):
            The file it was read from.
        output_dir (`Path`):
            Where runs and results are.
        seeds (`list[int]`):
            Each arm is trained with each of them.
        baseline (`str`):
            Arm that differences are taken from.
        overrides (`dict[str, Any]`):
            Keys of recipes, for every arm.
        data (`dict[str, dict[str, Any]]`):
            Name of each data set, and the keys of recipes that choose it.
        arms (`dict[str, Arm]`):
            By name, in the order of the file.
        evaluations (`dict[str, Any]`):
            Keys of [`EVALUATION_DEFAULTS`].
        content (`dict[str, Any]`):
            The file as it was read.
    """

    path: str
    output_dir: Path
    seeds: list[int]
    baseline: str
    overrides: dict[str, Any]
    data: dict[str, dict[str, Any]]
    arms: dict[str, Arm]
    evaluations: dict[str, Any]
    content: dict[str, Any]


def read_study(path: str) -> Study:
    """
    Read a study strictly: nothing unknown is passed over.

    Args:
        path (`str`):
            YAML file.

    Returns:
        [`Study`]: What it says, with the defaults of what it leaves out.

    Raises:
        `InputError`: If the file can't be read, or a key or value is unknown, missing or wrong.
    """
    if not Path(path).is_file():
        raise InputError(f"the study {path} can't be read: there is no such file.")
    content = read_mapping(path)
    try:
        return study_of(content, path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def study_of(content: dict[str, Any], path: str) -> Study:
    refuse_unknown(content, STUDY_KEYS, "the study")
    for key in REQUIRED_KEYS:
        if key not in content:
            raise InputError(f"`{key}` is missing.")
    require_type("output_dir", content["output_dir"], str, "a folder")
    require_type("baseline", content["baseline"], str, "the name of an arm")
    budget = checked_budget("`budget`", content.get("budget"), AMOUNTS)
    arms = named_mappings(content, "arms")
    study = Study(
        path=path,
        output_dir=Path(content["output_dir"]),
        seeds=checked_seeds(content["seeds"]),
        baseline=content["baseline"],
        overrides=mapping("overrides", content.get("overrides")),
        data=named_mappings(content, "data"),
        arms={name: make_arm(name, values, budget) for name, values in arms.items()},
        evaluations=checked_evaluations(content.get("evaluations")),
        content=content,
    )
    if study.baseline not in study.arms:
        raise InputError(
            f"`baseline` is {study.baseline!r}, which is no arm" + nearest_name(study.baseline, study.arms)
        )
    for arm in study.arms.values():
        others = [name for name in study.arms if name != arm.name]
        for control in arm.controls:
            if control not in others:
                raise InputError(
                    f"`controls` of arm `{arm.name}` has {control!r}, which is no other arm"
                    + nearest_name(control, others)
                )
    for name, values in study.data.items():
        if not isinstance(values.get("dataset_name"), str):
            raise InputError(f"data set `{name}` needs `dataset_name`, a folder or an id on the Hub; got {values}.")
    refuse_cycles(study)
    return study


def make_arm(name: str, values: dict[str, Any], study_budget: dict[str, Any]) -> Arm:
    refuse_unknown(values, ARM_KEYS, f"arm `{name}`")
    if not isinstance(values.get("recipe"), str):
        raise InputError(f"arm `{name}` needs `recipe`, the path of a recipe; got {values}.")
    overrides = mapping(f"overrides` of arm `{name}", values.get("overrides"))
    budget = checked_budget(f"`budget` of arm `{name}`", values["budget"], BUDGET_KEYS) if "budget" in values else None
    controls = values.get("controls", [])
    require_type(f"controls` of arm `{name}", controls, list, "a list of other arms")
    return Arm(name, values["recipe"], overrides, study_budget if budget is None else budget, controls)


def checked_seeds(seeds: Any) -> list[int]:
    is_list = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not is_list or len(set(seeds)) < len(seeds):
        raise InputError(
            f"`seeds` is {seeds!r}: give a list of one or more different integers from 0, such as [0, 1]."
        )
    return seeds


def checked_budget(where: str, budget: Any, known: tuple[str, ...]) -> dict[str, Any]:
    if budget is None:
        return {}
    if not isinstance(budget, dict) or len(budget) != 1:
        raise InputError(f"{where} is {budget!r}: give one of {', '.join(known)}, such as `{{steps: 100}}`.")
    refuse_unknown(budget, known, where)
    ((key, amount),) = budget.items()
    number = int if key == "steps" else int | float
    if key.endswith("_of"):
        require_type(f"{key}` of {where.removesuffix('`')}", amount, str, "the name of another arm")
    elif isinstance(amount, bool) or not isinstance(amount, number) or not 0 < amount < math.inf:
        raise InputError(f"{where}: `{key}` is {amount!r}, but must be a positive number.")
    return budget


def checked_evaluations(given: Any) -> dict[str, Any]:
    given = mapping("evaluations", given)
    refuse_unknown(given, EVALUATION_DEFAULTS, "`evaluations`")
    evaluations = {**EVALUATION_DEFAULTS, **given}
    for name in ("dataset_name", "dataset_config"):
        if evaluations[name] is not None:
            require_type(name, evaluations[name], str, "a text")
    require_type("dataset_split", evaluations["dataset_split"], str, "the name of a split")
    require_type("tagged", evaluations["tagged"], bool, "true or false")
    for name in ("max_new_tokens", "batch_size"):
        value = evaluations[name]
        if (type(value) is not int or value < 1) and not (name == "max_new_tokens" and value is None):
            raise InputError(f"`evaluations`: `{name}` is {value!r}, but must be a positive integer.")
    if evaluations["lm_eval"] is not None:
        evaluations["lm_eval"] = checked_lm_eval(evaluations["lm_eval"])
    return evaluations


def checked_lm_eval(given: Any) -> dict[str, Any]:
    settings = {**LM_EVAL_DEFAULTS, **mapping("lm_eval", given)}
    refuse_unknown(settings, LM_EVAL_DEFAULTS, "`lm_eval`")
    tasks = settings["tasks"]
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise InputError(f"`lm_eval`: `tasks` is {tasks!r}: give a list of names, such as [arc_easy].")
    for name, types in (("limit", (int, float)), ("num_fewshot", (int,))):
        value = settings[name]
        if value is not None and (type(value) not in types or not value >= 0):
            raise InputError(f"`lm_eval`: `{name}` is {value!r}, but must be a number from 0.")
    folder = settings["include_path"]
    if folder is not None and not (isinstance(folder, str) and Path(folder).is_dir()):
        raise InputError(f"`lm_eval`: `include_path` is {folder!r}, which is no folder.")
    return settings


def refuse_cycles(study: Study) -> None:
    """
    Raises:
        `InputError`: If an arm needs one that isn't there, or needs itself in the end.
    """
    for arm in study.arms.values():
        for other in arm.others() - set(study.arms):
            raise InputError(f"arm `{arm.name}` needs `{other}`, which is no arm" + nearest_name(other, study.arms))
    in_order = []
    while len(in_order) < len(study.arms):
        ready = [arm.name for arm in study.arms.values() if arm.name not in in_order and arm.others() <= set(in_order)]
        if not ready:
            circle = ", ".join(f"`{name}`" for name in study.arms if name not in in_order)
            raise InputError(f"the arms {circle} wait for each other: none of them can be the first.")
        in_order += ready


def named_mappings(content: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    entries = mapping(key, content[key])
    if not entries:
        raise InputError(f"`{key}` is empty: give at least one.")
    for name, values in entries.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InputError(
                f"`{key}` has the name {name!r}, which can't be a folder's: use letters, digits and `_.-`, and quotes "
                "around a number."
            )
        require_type(f"{key}` entry `{name}", values, dict, "lines of `key: value`")
    return entries


def mapping(name: str, value: Any) -> dict[str, Any]:
    value = {} if value is None else value
    require_type(name, value, dict, "lines of `key: value`")
    return value


def require_type(name: str, value: Any, wanted: type, words: str) -> None:
    if not isinstance(value, wanted):
        raise InputError(f"`{name}` must be {words}, got {value!r}.")


def refuse_unknown(values: dict[str, Any], known: Iterable[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise InputError(f"{where}: unknown key `{key}`" + nearest_name(key, known))


def nearest_name(name: str, known: Iterable[str]) -> str:
    return nearest(name, known, otherwise=f"known are {', '.join(f'`{key}`' for key in known)}")


def texts_in(value: Any) -> list[str]:
    """All texts in a value of YAML, however deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    return [value] if isinstance(value, str) else []
