"""How long a run trains."""

import json
from pathlib import Path

import pytest
import yaml

from hf_sft_variants.comparison import budgets, plan_runs, read_study, run
from hf_sft_variants.comparison.budgets import amount_of, steps_of_seconds
from hf_sft_variants.comparison.files import read_json, write_json
from hf_sft_variants.comparison.plan import description
from hf_sft_variants.errors import InputError
from hf_sft_variants.launch.loading import load_model_and_tokenizer, load_split


METHODS = {
    "sft": {},
    "sft_go": {},
    "sftkey": {"key_delimiter": "####"},
    "sftmix": {"per_device_train_batch_size": 4},
}


@pytest.fixture
def make_run(write_study, in_this_process):
    """The folder of one run, ready to be done."""

    def make(budget, recipe="sft.yaml", **overrides):
        arm = {"recipe": recipe, "overrides": overrides, "budget": budget}
        (only,) = plan_runs(
            read_study(write_study(seeds=[0], arms={"sft": arm}, evaluations={"max_new_tokens": None}))
        )
        only.folder.mkdir(parents=True)
        write_json(only.folder / "run.json", description(only))
        return only.folder

    return make


def tokens_of_rows():
    _, tokenizer = load_model_and_tokenizer("model", device="cpu")
    rows = load_split("data", "train")
    return [
        len(tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"])
        for row in rows
    ]


@pytest.mark.parametrize("method", METHODS)
def test_tokens_become_whole_steps(make_run, folder, method):
    recipe = yaml.safe_load((folder / "sft.yaml").read_text())
    module = {} if method == "sft" else {"module": f"hf_sft_variants.{method}"}
    (folder / "method.yaml").write_text(
        yaml.safe_dump(
            {"num_processes": 1, **module, **{k: v for k, v in recipe.items() if k != "num_processes"}},
            sort_keys=False,
        )
    )
    per_epoch = sum(tokens_of_rows())  # two steps of four rows
    run_folder = make_run({"tokens": 2.2 * per_epoch}, "method.yaml", **METHODS[method])
    run.do_run(run_folder)
    training = read_json(run_folder / "training.json")
    assert training["steps"] == 4
    assert training["tokens"] == 2 * per_epoch  # whole epochs, so to the last token
    assert yaml.safe_load((run_folder / "recipe.yaml").read_text())["max_steps"] == 4
    if method == "sftmix":
        assert read_json(run_folder / "reference" / "settings.json")["max_steps"] == 4
        assert training["extra_passes"] == "a reference is trained as long, and evaluated on the data 3 or more times"


@pytest.mark.parametrize("epochs, steps", [(2, 4), (0.001, 1)])
def test_tokens_with_accumulation_and_at_least_one_step(make_run, epochs, steps):
    run_folder = make_run(
        {"tokens": epochs * sum(tokens_of_rows())}, gradient_accumulation_steps=3, per_device_train_batch_size=2
    )
    run.do_run(run_folder)
    assert read_json(run_folder / "training.json")["steps"] == steps


def test_without_a_budget_the_recipe_says(make_run, write_study):
    path = write_study(seeds=[0], budget=None, overrides={"num_train_epochs": 3})
    only = plan_runs(read_study(path))[0]
    only.folder.mkdir(parents=True)
    write_json(only.folder / "run.json", description(only))
    run.do_run(only.folder)
    assert read_json(only.folder / "training.json")["steps"] == 6


def test_seconds_are_the_steps_that_fit(monkeypatch):
    monkeypatch.setattr(budgets, "_seconds_of_steps", lambda steps, folder, run: (4.0, 1.0 + 0.5 * steps))
    assert steps_of_seconds(25.2, Path(), {}) == 40
    assert steps_of_seconds(5.5, Path(), {}) == 1
    with pytest.raises(
        InputError, match="the budget is 5.4 s, but what comes before the first step takes 5.0 s and a step"
    ):
        steps_of_seconds(5.4, Path(), {})
    asked = []
    monkeypatch.setattr(
        budgets, "_seconds_of_steps", lambda steps, folder, run: asked.append(steps) or (4.0, 1.0 + 0.25 * steps)
    )
    assert steps_of_seconds(15.0, Path(), {}) == 40 and asked == [4, 12, 48]  # 2 s are too few to tell, 11 s are not
    monkeypatch.setattr(budgets, "_seconds_of_steps", lambda steps, folder, run: (9.0, 5.0))
    with pytest.raises(InputError, match="4 steps took 5.00 s and 192 steps 5.00 s, which says nothing"):
        steps_of_seconds(25.0, Path(), {})


class Clocked:
    """Stands for the process of a calibration run, which takes 3 s and 2 s a step."""

    started = []

    def __init__(self, folder):
        description = read_json(folder / "run.json")
        steps = description["budget"]["steps"]
        Clocked.started.append(description)
        assert description["evaluations"] is None and description["recipe"]["output_dir"] == str(folder)
        assert description["recipe"]["score_cache_dir"] == str(folder / "scores")
        write_json(folder / "training.json", {"seconds": 3.0 + 2.0 * steps, "seconds_preparing": 2.5})

    def wait(self):
        return 0


def test_calibration_is_thrown_away_and_its_result_kept(make_run, monkeypatch):
    monkeypatch.setattr(budgets, "start_process", Clocked)
    monkeypatch.setattr(Clocked, "started", [])
    run_folder = make_run({"seconds": 9.5}, "sft_go.yaml")
    run.do_run(run_folder)
    assert [description["budget"] for description in Clocked.started] == [{"steps": 4}, {"steps": 12}]
    assert read_json(run_folder / "training.json")["steps"] == 3
    assert not (run_folder / "calibration").exists()
    before = (run_folder / "recipe.yaml").read_bytes()
    (run_folder / "training.json").unlink()  # as if it had been killed
    run.do_run(run_folder)
    assert len(Clocked.started) == 2 and (run_folder / "recipe.yaml").read_bytes() == before
    assert read_json(run_folder / "training.json")["steps"] == 3


def test_a_calibration_that_fails_says_why(make_run, monkeypatch):
    def fail(folder):
        (folder / "log.txt").write_text("Traceback\nKeyError: 'x'\n")
        return type("Failed", (), {"wait": lambda self: 1})()

    monkeypatch.setattr(budgets, "start_process", fail)
    with pytest.raises(
        InputError, match="a run of 4 steps, to learn how long one takes, failed:\n    Traceback\n    KeyError"
    ):
        run.do_run(make_run({"seconds": 9.5}))


@pytest.mark.parametrize("kind, amount", [("steps", 7), ("tokens", 812.0), ("seconds", 3.25)])
def test_as_much_as_another_arm(tmp_path, kind, amount):
    other = tmp_path / "sums" / "poft" / "seed_3"
    other.mkdir(parents=True)
    (other / "training.json").write_text(json.dumps({"steps": 7, "tokens": 812.0, "seconds": 3.25}))
    assert amount_of({f"{kind}_of": "poft"}, tmp_path / "sums" / "longer" / "seed_3") == (kind, amount)
    assert amount_of({kind: amount}, tmp_path) == (kind, amount)
    assert amount_of({}, tmp_path) == (None, None)
