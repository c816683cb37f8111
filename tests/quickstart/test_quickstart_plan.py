"""What `make quickstart` announces is what it does."""

import inspect
import re
from pathlib import Path

import yaml

from hf_sft_variants.quickstart import build_splits


ROOT = Path(__file__).parents[2]


def test_rows_and_steps_are_those_of_the_recipe():
    (plan,) = re.findall(r"^define PLAN\n(.*?)\nendef", (ROOT / "Makefile").read_text(), re.DOTALL | re.MULTILINE)
    recipe = yaml.safe_load((ROOT / "recipes/quickstart/sft_go.yaml").read_text())
    rows = inspect.signature(build_splits).parameters["train_size"].default
    assert f" on {rows} sums " in plan
    assert recipe["num_train_epochs"] == 1
    assert f"Train for one epoch of {rows // recipe['per_device_train_batch_size']} steps" in plan
