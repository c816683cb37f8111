"""The map in CONTRIBUTING.md shows the rooms that the linter checks, and names files that exist."""

import re
import tomllib
from pathlib import Path


ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_sft_variants"
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def test_map_has_the_rooms_in_the_order_of_their_layers():
    contract, _ = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rows = re.findall(r"^\| (`.+?`) \| ", TEXT, re.MULTILINE)
    assert [re.findall(r"`(\w+)(?:/|\.py)`", row) for row in rows] == [
        layer.split(" | ") for layer in contract["layers"]
    ]


def test_named_files_exist():
    for name in re.findall(r"`([\w./]+(?:/|\.py|\.toml|\.txt))`", TEXT):
        assert any((folder / name).exists() for folder in (ROOT, PACKAGE)), name
