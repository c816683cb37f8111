"""What `make quickstart` announces is what it does."""

import re
from pathlib import Path

import yaml


ROOT = Path(__file__).parents[2]


def test_rows_and_steps_are_those_of_the_recipe():
    makefile = (ROOT / "Makefile").read_text()
    (plan,) = re.findall(r"^define PLAN\n(.*?)\nendef", makefile, re.DOTALL | re.MULTILINE)
    (rows,) = map(int, re.findall(r"^TRAIN_FLAGS = --dataset_train_split 'train\[:(\d+)\]'$", makefile, re.MULTILINE))
    recipe = yaml.safe_load((ROOT / "recipes/quickstart/sft_go.yaml").read_text())
    assert f" on {rows} sums " in plan
    assert recipe["num_train_epochs"] == 1
    assert f"Train for one epoch of {rows // recipe['per_device_train_batch_size']} steps" in plan
