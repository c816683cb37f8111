"""Studies are read and checked before anything is trained."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hf_sft_variants.comparison import check_devices, compare_study, plan_runs, read_study
from hf_sft_variants.comparison.plan import description
from hf_sft_variants.errors import InputError


SFT, SFT_GO = {"recipe": "sft.yaml"}, {"recipe": "sft_go.yaml"}


def poft(**overrides):
    return {"recipe": "poft.yaml", "overrides": overrides}


def arms(**more):
    return {"arms": {"sft": SFT, **more}}


def test_values_and_defaults(write_study):
    longer = {**SFT, "budget": {"tokens_of": "sft_go"}}
    study = read_study(write_study(**arms(sft_go=SFT_GO, longer=longer), evaluations=None))
    assert (study.seeds, study.baseline, study.output_dir) == ([0, 1], "sft", Path("study"))
    assert study.arms["sft"].budget == {"steps": 2} and study.arms["longer"].budget == {"tokens_of": "sft_go"}
    assert study.arms["longer"].others() == {"sft_go"} and study.arms["sft"].others() == set()
    assert study.evaluations["dataset_split"] == "test" and study.evaluations["batch_size"] == 25
    assert study.overrides == {}


def test_flags_are_overrides_of_the_study(write_study):
    changes = {**arms(sft_go={**SFT_GO, "overrides": {"max_length": 64}}), "overrides": {"max_length": 32}}
    flags = ["--max_length", "48", "--learning_rate", "1.0e-2", "--use_cpu", "true"]
    study = read_study(write_study(**changes), seeds=[7], flags=flags)
    assert study.overrides == {"max_length": 48, "learning_rate": 0.01, "use_cpu": True}
    assert study.content["overrides"] == study.overrides and study.content["seeds"] == [7]
    recipes = {run.arm: run.recipe for run in plan_runs(study)}
    assert {name: recipe["max_length"] for name, recipe in recipes.items()} == {"sft": 48, "sft_go": 64}
    assert {recipe["learning_rate"] for recipe in recipes.values()} == {0.01}


def test_texts_as_flags(write_study):
    flags = ["--key_delimiter", "####", "--key_pattern", "[a", "--group_column", "null"]
    expected = {"key_delimiter": "####", "key_pattern": "[a", "group_column": None}
    assert read_study(write_study(), flags=flags).overrides == expected


@pytest.mark.parametrize("flags", [["--max_length"], ["max_length", "3"], ["--a", "1", "2", "3"]])
def test_flags_that_are_no_keys(flags, write_study):
    with pytest.raises(InputError, match="recipe keys must be given as `--key value`, got `(.*max_length|--a 1 2 3)"):
        read_study(write_study(), flags=flags)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": [1]}, "unknown key `seed`; did you mean `seeds`?"),
        ({"zzz": 1}, "unknown key `zzz`; known are `output_dir`, `seeds`"),
        ({"baseline": None}, "`baseline` is missing"),
        ({"baseline": "sft_og"}, "`baseline` is 'sft_og', which is not an arm; did you mean `sft_go`?"),
        ({"baseline": ["sft"]}, "`baseline` must be str, got ['sft']"),
        ({"output_dir": 3}, "`output_dir` must be str, got 3"),
        ({"seeds": [0, 0]}, "`seeds` must be one or more different integers from 0, such as [0, 1], got [0, 0]"),
        ({"seeds": 3}, "`seeds` must be list[int], got 3"),
        ({"seeds": []}, "`seeds` must be one or more"),
        ({"seeds": [-1]}, "integers from 0, such as [0, 1], got [-1]"),
        ({"seeds": [True]}, "`seeds` must be list[int], got [True]"),
        ({"data": {}}, "`data` is empty"),
        ({"data": {"sums": {"max_length": 3}}}, "data set `sums` needs `dataset_name`"),
        (
            {"data": {"a/b": {"dataset_name": "data"}}},
            "`data` has the name 'a/b', which can't be the name of a folder",
        ),
        ({"arms": {"..": SFT}}, "`arms` has the name '..'"),
        (
            {"arms": {1: SFT}},
            "`arms` has the name 1, which can't be the name of a folder: use letters, digits and `_.-`, and",
        ),
        ({"arms": {"sft": "sft.yaml"}}, "must be lines of `key: value`, got 'sft.yaml'"),
        (arms(x={"overrides": {}}), "arm `x` needs `recipe`"),
        (arms(x={**SFT, "override": {}}), "arm `x`: unknown key `override`; did you mean `overrides`?"),
        ({"budget": {"epochs": 1}}, "`budget`: unknown key `epochs`; known are `steps`, `tokens`."),
        (
            {"budget": {"steps": 1, "tokens": 2}},
            "`budget` must be one of steps, tokens, such as `{steps: 100}`, got {'steps': 1, 'tokens': 2}",
        ),
        ({"budget": {"steps": 0}}, "`steps` must be a positive number, got 0"),
        ({"budget": {"steps": 1.5}}, "`steps` must be int, got 1.5"),
        ({"budget": {"tokens": float("nan")}}, "`tokens` must be a positive number, got nan"),
        (
            arms(x={**SFT, "budget": {"steps_of": 3}}),
            "`budget` of arm `x`: `steps_of` must be str, got 3",
        ),
        ({"budget": {"steps_of": "sft"}}, "`budget`: unknown key `steps_of`; did you mean `steps`?"),
        (arms(x={**SFT, "budget": {"tokens": True}}), "`budget` of arm `x`: `tokens` must be int | float, got True"),
        (
            arms(x={**SFT, "budget": {"steps_of": "stf"}}),
            "arm `x` needs `stf`, which is not an arm; did you mean `sft`?",
        ),
        (arms(x={**SFT, "budget": {"steps_of": "x"}}), "the arms `x` wait for each other"),
        (
            arms(x={**SFT, "budget": {"steps_of": "y"}}, y={**SFT, "overrides": {"run_name": "{runs}/x/seed_{seed}"}}),
            "the arms `x`, `y` wait for each other",
        ),
        (
            arms(x={**SFT, "controls": ["sft", "stf"]}),
            "`controls` of arm `x` has 'stf', which is not another arm; did you",
        ),
        (arms(x={**SFT, "controls": ["x"]}), "`controls` of arm `x` has 'x', which is not another arm"),
        (arms(x={**SFT, "controls": "sft"}), "arm `x`: `controls` must be list[str], got 'sft'"),
        (arms(x=poft(reference_models=["{runs}/z/seed_{seed}"])), "arm `x` needs `z`, which is not an arm"),
        ({"evaluations": {"batch": 1}}, "`evaluations`: unknown key `batch`; did you mean `batch_size`?"),
        ({"evaluations": {"batch_size": 0}}, "`batch_size` must be a positive integer, got 0"),
        ({"evaluations": {"max_new_tokens": "many"}}, "`max_new_tokens` must be int | None, got 'many'"),
        ({"evaluations": {"tagged": "yes"}}, "`tagged` must be bool, got 'yes'"),
        (
            {"evaluations": {"parts": {"answer": "(####"}}},
            "`evaluations`: the pattern of `answer` in `parts`, '(####', is not a regular expression: missing ), ",
        ),
        ({"evaluations": {"parts": {"answer": 4}}}, "`parts` must be dict[str, str] | None, got {'answer': 4}"),
        ({"evaluations": {"lm_eval": {"limit": 3}}}, "`tasks` must be a list of names, such as [arc_easy], got None"),
        (
            {"evaluations": {"lm_eval": {"tasks": ["a"], "limit": "ten"}}},
            "`lm_eval`: `limit` must be int | float | None, got 'ten'",
        ),
        (
            {"evaluations": {"lm_eval": {"tasks": ["a"], "num_fewshot": 1.5}}},
            "`lm_eval`: `num_fewshot` must be int | None, got 1.5",
        ),
        (
            {"evaluations": {"lm_eval": {"tasks": ["a"], "include_path": "x"}}},
            "`include_path` must be a folder, got 'x'",
        ),
        ({"evaluations": {"lm_eval": {"task": ["a"]}}}, "`lm_eval`: unknown key `task`; did you mean `tasks`?"),
    ],
)
def test_what_is_wrong_with_the_study(write_study, changes, message):
    path = write_study(**changes)
    with pytest.raises(InputError) as error:
        read_study(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (arms(x={"recipe": "nowhere.yaml"}), "nowhere.yaml can't be read: No such file"),
        (
            arms(x={**SFT, "overrides": {"learnin_rate": 1}}),
            "unknown key `learnin_rate`; did you mean `learning_rate`?",
        ),
        (arms(x={**SFT, "overrides": {"beta": 1.0}}), "arm `x` on data `sums`: unknown key `beta`"),
        (arms(x={**SFT, "overrides": {"learning_rate": "fast"}}), "`learning_rate` must be float, got 'fast'"),
        (
            arms(x={**SFT_GO, "overrides": {"important_fraction": 2.0}}),
            "`important_fraction` must be a number between",
        ),
        (arms(x={**SFT, "overrides": {"seed": 3}}), "`seed` is set by the study itself"),
        (arms(x={**SFT, "overrides": {"module": "hf_sft_variants.poft"}}), "`module` is set by the study itself"),
        ({"overrides": {"output_dir": "x"}}, "`output_dir` is set by the study itself"),
        (
            arms(x=poft(reference_models=["{runs}/sft/seed_0"])),
            "must name another arm's run as `{runs}/ARM/seed_{seed}`",
        ),
        ({"overrides": {"run_name": "{runs}/sft/seed_{seed}"}}, "in the arm's own `overrides`"),
        (
            {"data": {"sums": {"dataset_name": "nowhere"}}},
            "`dataset` 'nowhere' with `split` 'test' could not be loaded",
        ),
        ({"data": {"sums": {"dataset_name": "data", "dataset_train_split": "tr"}}}, "`dataset_train_split` is 'tr'"),
        (
            {"data": {"sums": {"dataset_name": "data_{seed}"}}},
            "all seeds are evaluated on the same rows, but data `sums`",
        ),
        ({"evaluations": {"dataset_split": "dev"}}, "with `split` 'dev' could not be loaded"),
        ({"evaluations": {"dataset_name": "texts"}}, "`dataset` has no column 'prompt', 'completion', only 'text'"),
        ({"evaluations": {"dataset_name": "words"}}, "`answer` of row 0 is 'Paris', not a number"),
    ],
)
def test_what_is_wrong_with_what_the_study_names(write_study, changes, message):
    row = {"prompt": [{"role": "user", "content": "?"}], "completion": [{"role": "assistant", "content": "!"}]}
    for name, content in {"texts": {"text": "a"}, "words": {**row, "answer": "Paris"}}.items():
        os.mkdir(name)
        Path(name, "test.jsonl").write_text(json.dumps(content))
    study = read_study(write_study(**changes))
    with pytest.raises(InputError) as error:
        plan_runs(study)
    assert message in str(error.value)
    assert not Path("study").exists()


@pytest.mark.parametrize("key, value", [("num_processes", 8), ("use_fsdp", True), ("accelerate_config", "zero2")])
def test_a_recipe_of_several_processes_is_refused(write_study, folder, key, value):
    recipe = yaml.safe_load((folder / "sft.yaml").read_text())
    (folder / "sft.yaml").write_text(
        yaml.safe_dump({key: value, **{k: v for k, v in recipe.items() if k != key}}, sort_keys=False)
    )
    with pytest.raises(
        InputError, match=f"sft.yaml launches with `{key}: {value}`, but a run of a study is one process"
    ):
        plan_runs(read_study(write_study()))


def test_runs_and_their_recipes(write_study):
    references = ["model", "{runs}/sft/seed_{seed}"]
    study = read_study(
        write_study(
            overrides={"learning_rate": 0.5, "lora_r": 4},
            data={"sums": {"dataset_name": "data"}, "short": {"dataset_name": "data", "max_length": 32}},
            arms={"poft": poft(reference_models=references, learning_rate="1e-4"), "sft": SFT},
        )
    )
    runs = {(run.arm, run.data, run.seed): run for run in plan_runs(study)}
    assert list(runs) == [(a, d, s) for s in (0, 1) for d in ("sums", "short") for a in ("poft", "sft")]
    run = runs["poft", "short", 1]
    assert run.folder == Path("study/runs/short/poft/seed_1")
    assert run.others == (Path("study/runs/short/sft/seed_1"),)
    assert run.recipe["reference_models"] == ["model", "study/runs/short/sft/seed_1"]
    assert (run.recipe["learning_rate"], run.recipe["lora_r"], run.recipe["max_length"]) == ("1e-4", 4, 32)
    assert (run.recipe["seed"], run.recipe["output_dir"]) == (1, str(run.folder))
    assert run.recipe["score_cache_dir"] == str(run.folder / "scores")
    assert run.evaluations["dataset_name"] == "data"
    assert "num_processes" not in run.recipe and "score_cache_dir" not in runs["sft", "sums", 0].recipe


def test_data_of_the_runs_own(write_study, folder):
    """The name of a data set may have the run's data and seed in it, and all of them are looked for."""
    # From the root: a name that is not found is looked for among what was loaded before
    overrides = {"dataset_name": f"{folder}/{{data}}_{{seed}}", "dataset_train_split": "train"}
    study = read_study(write_study(arms={"sft": SFT, "other": {**SFT, "overrides": overrides}}))
    (folder / "sums_0").symlink_to(folder / "data")
    with pytest.raises(InputError, match="arm `other` on data `sums`: `dataset_name` is '.*/sums_1', which can't be"):
        plan_runs(study)
    (folder / "sums_1").symlink_to(folder / "data")
    runs = [run for run in plan_runs(study) if run.arm == "other"]
    assert [run.recipe["dataset_name"] for run in runs] == [f"{folder}/sums_0", f"{folder}/sums_1"]
    assert all(run.evaluations["dataset_name"] == "data" for run in runs)


def test_a_folder_of_another_run(write_study):
    (run, *_) = plan_runs(read_study(write_study()))
    run.folder.mkdir(parents=True)
    (run.folder / "notes.txt").touch()
    with pytest.raises(InputError, match="study/runs/sums/sft/seed_0 should hold the run .* but has other files"):
        plan_runs(read_study(write_study()))
    (run.folder / "run.json").write_text(json.dumps(description(run)))
    assert plan_runs(read_study(write_study()))
    for changes, names in [
        ({"overrides": {"learning_rate": 0.5, "max_length": 32}}, "`max_length`, `learning_rate`"),
        ({"budget": {"steps": 3}}, "`budget`"),
    ]:
        with pytest.raises(InputError, match=f"with other settings: {names}. Remove the folder"):
            plan_runs(read_study(write_study(**changes)))
    assert plan_runs(read_study(write_study(evaluations={"batch_size": 3})))  # evaluated again, not trained again
    Path("data/train.jsonl").write_text("".join(Path("data/train.jsonl").read_text().splitlines(True)[1:]))
    with pytest.raises(InputError, match="with other settings: the rows of its data set. Remove the folder"):
        plan_runs(read_study(write_study()))


def test_what_a_full_disk_left_is_no_hindrance(write_study):
    (run, *_) = plan_runs(read_study(write_study()))
    run.folder.mkdir(parents=True)
    (run.folder / "run.json.partial").touch()
    assert plan_runs(read_study(write_study()))


def test_other_test_rows_are_evaluated_again(write_study):
    (run, *_) = plan_runs(read_study(write_study()))
    (again, *_) = plan_runs(read_study(write_study()))
    assert run.evaluations == again.evaluations
    Path("data/test.jsonl").write_text("".join(Path("data/test.jsonl").read_text().splitlines(True)[::-1]))
    (other, *_) = plan_runs(read_study(write_study()))
    assert run.evaluations != other.evaluations and run.training_rows == other.training_rows


def test_parts_that_no_response_has(write_study):
    parts = {"steps": "Add the ones", "answer": "Answer: .*"}
    message = "`parts` has 'Answer: .*' for `answer`, which matches no `completion` of the data: correct it"
    with pytest.raises(InputError, match=re.escape(message)):
        plan_runs(read_study(write_study(evaluations={"parts": parts})))
    assert plan_runs(read_study(write_study(evaluations={"parts": {"steps": "Add the ones"}})))
    with pytest.raises(InputError, match="Tagged responses can't be divided into parts"):
        plan_runs(read_study(write_study(evaluations={"parts": {"steps": "Add the ones"}, "tagged": True})))


def test_a_study_that_is_not_there():
    with pytest.raises(InputError, match="nowhere.yaml can't be read: No such file"):
        read_study("nowhere.yaml")


@pytest.mark.parametrize(
    "devices, message",
    [(["0"], r"out of the 0 visible ones \(none\), got 0"), (["0", "0"], "different GPUs"), (["0,1"], "got 0,1")],
)
def test_devices_that_are_not_there(write_study, devices, message):
    with pytest.raises(InputError, match=message):
        compare_study(write_study(), devices)


def test_a_run_on_the_cpu_takes_no_device(write_study, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match="--devices: the run sft on sums, seed 0 has `use_cpu: true`"):
        compare_study(write_study(), ["0", "1"])
    plan = plan_runs(read_study(write_study()))
    check_devices([None], plan)
    on_gpu = [replace(run, recipe={**run.recipe, "use_cpu": False}) for run in plan]
    check_devices(["1", "0"], on_gpu)
    with pytest.raises(InputError, match="2 GPUs are visible, but a run takes one"):
        check_devices([None], on_gpu)


def test_a_folder_of_another_study(write_study):
    Path("study").mkdir()
    Path("study/results.json").write_text('{"study_file": "studies/other.yaml"}')
    with pytest.raises(InputError, match="`output_dir` study holds the results of studies/other.yaml"):
        compare_study(write_study())
