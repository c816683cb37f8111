"""What `make quickstart` announces is what it does."""

import re
from inspect import signature
from pathlib import Path

import yaml

from hf_sft_variants.quickstart import build_splits


ROOT = Path(__file__).parents[2]


def test_rows_and_steps_are_those_of_the_recipe():
    makefile = (ROOT / "Makefile").read_text()
    (plan,) = re.findall(r"^define PLAN\n(.*?)\nendef", makefile, re.DOTALL | re.MULTILINE)
    (steps,) = map(int, re.findall(r"^TRAIN_FLAGS = --max_steps (\d+)$", makefile, re.MULTILINE))
    recipe = yaml.safe_load((ROOT / "recipes/quickstart/sft_go.yaml").read_text())
    rows = steps * recipe["per_device_train_batch_size"]
    assert rows <= signature(build_splits).parameters["train_size"].default  # no row is trained on twice
    assert f" on {rows} sums " in plan
    assert f"Train for {steps} steps" in plan
