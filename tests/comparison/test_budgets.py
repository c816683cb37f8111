"""How long a run trains."""

import json

import pytest
import yaml
from methods import METHODS

from hf_sft_variants.comparison import plan_runs, read_study, run
from hf_sft_variants.comparison.files import read_json, write_json
from hf_sft_variants.comparison.plan import description
from hf_sft_variants.comparison.run import resolve_budget
from hf_sft_variants.launch.loading import load_model_and_tokenizer, load_split


OPTIONS = {
    "sft": {},
    "sft_go": {},
    "sftkey": {"key_delimiter": "####"},
    "sftmix": {"per_device_train_batch_size": 4},
}


@pytest.fixture
def make_run(write_study, in_this_process):
    """The folder of a run that has not started."""

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


@pytest.mark.parametrize("method", [name for name in OPTIONS if name in {"sft", *METHODS}])
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
    run_folder = make_run({"tokens": 2.2 * per_epoch}, "method.yaml", **OPTIONS[method])
    run.do_run(run_folder)
    training = read_json(run_folder / "training.json")
    steps = 2 if method == "sftmix" else 4
    assert training["steps"] == yaml.safe_load((run_folder / "recipe.yaml").read_text())["max_steps"] == steps
    assert training["tokens"] == 2 * per_epoch  # whole epochs, so to the last token
    if method == "sftmix":  # half of the tokens are its reference's
        assert read_json(run_folder / "reference" / "settings.json")["max_steps"] == 2


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


@pytest.mark.parametrize("kind, amount", [("steps", 7), ("tokens", 812.0)])
def test_as_much_as_another_arm(tmp_path, kind, amount):
    other = tmp_path / "sums" / "poft" / "seed_3"
    other.mkdir(parents=True)
    (other / "training.json").write_text(json.dumps({"steps": 7, "tokens": 812.0}))
    assert resolve_budget({f"{kind}_of": "poft"}, tmp_path / "sums" / "longer" / "seed_3") == (kind, amount)
    assert resolve_budget({kind: amount}, tmp_path) == (kind, amount)
    assert resolve_budget({}, tmp_path) == (None, None)
