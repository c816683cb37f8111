"""Reads a study, i.e. arms, data sets and seeds, strictly from a YAML file."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from ..launch.recipe_checks import check_type, error_in, nearest, read_mapping


# Keys of the file and of its parts, with their types
STUDY_KEYS = {
    "output_dir": str,
    "seeds": list[int],
    "baseline": str,
    "data": dict,
    "arms": dict,
    "overrides": dict | None,
    "budget": dict | None,
    "evaluations": dict | None,
}
REQUIRED_KEYS = ("output_dir", "seeds", "baseline", "data", "arms")
ARM_KEYS = {"recipe": str, "overrides": dict | None, "budget": dict | None, "controls": list[str]}
EVALUATION_KEYS = {
    "dataset_name": str | None,
    "dataset_config": str | None,
    "dataset_split": str,
    "tagged": bool,
    "max_new_tokens": int | None,
    "batch_size": int,
    "parts": dict[str, str] | None,
    "calibration": bool,
    "lm_eval": dict | None,
}
LM_EVAL_KEYS = {
    "tasks": list[str],
    "limit": int | float | None,
    "num_fewshot": int | None,
    "include_path": str | None,
}
EVALUATION_DEFAULTS = {
    **dict.fromkeys(EVALUATION_KEYS),
    "dataset_split": "test",
    "tagged": False,
    "max_new_tokens": 128,
    "batch_size": 25,
    "calibration": False,
}
# An amount, or for an arm as much as another arm's run
BUDGET_KEYS = {"steps": int, "tokens": int | float}
ARM_BUDGET_KEYS = {**BUDGET_KEYS, "steps_of": str, "tokens_of": str}

# Names become folders
NAME = re.compile(r"[\w][\w.-]*")
# The run of another arm on the same data with the same seed
OTHER_RUN = re.compile(r"\{runs\}/([^/{}]+)/seed_\{seed\}")


@dataclass(frozen=True)
class Arm:
    """
    One way of training that the study compares: a `trl sft` recipe by its path, and overrides of its keys. `budget`
    has one of `ARM_BUDGET_KEYS`; if empty, the recipe says how long it trains. `controls` are other arms to report
    differences from, in addition to the baseline.
    """

    name: str
    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    controls: list[str] = field(default_factory=list)

    def others(self) -> set[str]:
        """Arms that must be trained before this one."""
        budget_of = [value for key, value in self.budget.items() if key.endswith("_of")]
        return {*budget_of, *(name for text in texts_in(self.overrides) for name in OTHER_RUN.findall(text))}


@dataclass(frozen=True)
class Study:
    """
    A study file with its defaults filled in; `content` is what the file says. `overrides` has recipe keys for every
    arm, `data` those that choose each data set, by its name. Differences are taken from the arm `baseline`.
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


def read_study(path: str, seeds: list[int] | None = None, flags: list[str] | None = None) -> Study:
    """
    Read and check a study file. `seeds` replaces its own, and `flags` (`["--use_cpu", "false"]`) are added to its
    `overrides`. Raises an `InputError` if a key or value is unknown, missing or wrong.
    """
    content = read_mapping(path)
    with error_in(path):
        if seeds:
            content["seeds"] = seeds
        if flags:
            content["overrides"] = {**(content.get("overrides") or {}), **_overrides_of(flags)}
        return parse_study(content, path)


def _overrides_of(flags: list[str]) -> dict[str, Any]:
    names, values = flags[::2], flags[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise InputError(f"recipe keys must be given as `--key value`, got `{' '.join(flags)}`.")
    return {name.removeprefix("--"): _value_of(text) for name, text in zip(names, values, strict=True)}


def _value_of(text: str) -> Any:
    """The value that a recipe would have; what YAML can't read or takes for a comment is a text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return text if value is None and text.startswith("#") else value


def parse_study(content: dict[str, Any], path: str) -> Study:
    check_mapping(content, STUDY_KEYS)
    for key in REQUIRED_KEYS:
        if key not in content:
            raise InputError(f"`{key}` is missing.")
    seeds = content["seeds"]
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InputError(f"`seeds` must be one or more different integers from 0, such as [0, 1], got {seeds!r}.")
    budget = content.get("budget") or {}
    check_budget(budget, BUDGET_KEYS, "`budget`")
    for key in ("arms", "data"):
        check_names(content[key], key)
    study = Study(
        path=path,
        output_dir=Path(content["output_dir"]),
        seeds=seeds,
        baseline=content["baseline"],
        overrides=content.get("overrides") or {},
        data=content["data"],
        arms={name: make_arm(name, values, budget) for name, values in content["arms"].items()},
        evaluations=read_evaluations(content.get("evaluations") or {}),
        content=content,
    )
    for name, values in study.data.items():
        if not isinstance(values.get("dataset_name"), str):
            raise InputError(f"data set `{name}` needs `dataset_name`, a folder or an id on the Hub; got {values}.")
    check_arm_names(study)
    return study


def make_arm(name: str, values: dict[str, Any], study_budget: dict[str, Any]) -> Arm:
    where = f"arm `{name}`"
    check_mapping(values, ARM_KEYS, where)
    if "recipe" not in values:
        raise InputError(f"{where} needs `recipe`, the path of a recipe; got {values}.")
    budget = study_budget if "budget" not in values else values["budget"] or {}
    check_budget(budget, ARM_BUDGET_KEYS, f"`budget` of {where}")
    return Arm(name, values["recipe"], values.get("overrides") or {}, budget, values.get("controls", []))


def check_budget(budget: dict[str, Any], types: dict[str, Any], where: str) -> None:
    check_mapping(budget, types, where)
    if len(budget) > 1:
        raise InputError(f"{where} must be one of {', '.join(types)}, such as `{{steps: 100}}`, got {budget}.")
    for key, amount in budget.items():
        if not isinstance(amount, str) and not 0 < amount < math.inf:
            raise InputError(f"{where}: `{key}` must be a positive number, got {amount!r}.")


def read_evaluations(given: dict[str, Any]) -> dict[str, Any]:
    where = "`evaluations`"
    check_mapping(given, EVALUATION_KEYS, where)
    evaluations = {**EVALUATION_DEFAULTS, **given}
    for key in ("max_new_tokens", "batch_size"):
        if evaluations[key] is not None and evaluations[key] < 1:
            raise InputError(f"{where}: `{key}` must be a positive integer, got {evaluations[key]!r}.")
    for name, pattern in (evaluations["parts"] or {}).items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(
                f"{where}: the pattern of `{name}` in `parts`, {pattern!r}, is not a regular expression: {error}."
            ) from error
    if evaluations["lm_eval"] is not None:
        evaluations["lm_eval"] = read_lm_eval(evaluations["lm_eval"])
    return evaluations


def read_lm_eval(given: dict[str, Any]) -> dict[str, Any]:
    where = "`lm_eval`"
    check_mapping(given, LM_EVAL_KEYS, where)
    if not given.get("tasks"):
        raise InputError(f"{where}: `tasks` must be a list of names, such as [arc_easy], got {given.get('tasks')!r}.")
    settings = {**dict.fromkeys(LM_EVAL_KEYS), **given}
    for key in ("limit", "num_fewshot"):
        if settings[key] is not None and not settings[key] >= 0:
            raise InputError(f"{where}: `{key}` must be a number from 0, got {settings[key]!r}.")
    if settings["include_path"] is not None and not Path(settings["include_path"]).is_dir():
        raise InputError(f"{where}: `include_path` must be a folder, got {settings['include_path']!r}.")
    return settings


def check_arm_names(study: Study) -> None:
    """Check that every arm that is named exists, and that no arm waits for itself."""
    if study.baseline not in study.arms:
        raise InputError(f"`baseline` is {study.baseline!r}, which is not an arm" + known(study.baseline, study.arms))
    for arm in study.arms.values():
        others = [name for name in study.arms if name != arm.name]
        for control in arm.controls:
            if control not in others:
                raise InputError(
                    f"`controls` of arm `{arm.name}` has {control!r}, which is not another arm"
                    + known(control, others)
                )
        for other in arm.others() - set(study.arms):
            raise InputError(f"arm `{arm.name}` needs `{other}`, which is not an arm" + known(other, study.arms))
    ready: set[str] = set()
    while len(ready) < len(study.arms):
        next_arms = {arm.name for arm in study.arms.values() if arm.others() <= ready}
        if next_arms == ready:
            circle = ", ".join(f"`{name}`" for name in study.arms if name not in ready)
            raise InputError(f"the arms {circle} wait for each other: none of them can be the first.")
        ready = next_arms


def check_names(entries: dict[str, Any], key: str) -> None:
    if not entries:
        raise InputError(f"`{key}` is empty: give at least one.")
    for name, values in entries.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InputError(
                f"`{key}` has the name {name!r}, which can't be the name of a folder: use letters, digits and "
                "`_.-`, and quotes around a number."
            )
        check_mapping(values, None, f"`{key}` entry `{name}`")


def check_mapping(values: Any, types: dict[str, Any] | None, where: str = "") -> None:
    """Check a part of the file: it is a mapping, and has known keys with values of their types."""
    prefix = f"{where}: " if where else ""
    if not isinstance(values, dict):
        raise InputError(f"{where} must be lines of `key: value`, got {values!r}.")
    for key, value in values.items() if types is not None else ():
        if key not in types:
            raise InputError(f"{prefix}unknown key `{key}`" + known(key, types))
        check_type(f"{prefix}`{key}`", value, types[key])


def known(name: str, names: Iterable[str]) -> str:
    """End of a message about an unknown name."""
    return nearest(name, names, otherwise=f"known are {', '.join(f'`{key}`' for key in names)}")


def texts_in(value: Any) -> list[str]:
    """All strings in a YAML value, however deeply nested."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    return [value] if isinstance(value, str) else []
