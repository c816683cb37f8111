"""The source distribution builds without git, has what the wheel is built from, and both have no tests."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import hf_sft_variants


ROOT = Path(__file__).parents[1]
VERSION = hf_sft_variants.__version__
PACKAGE_FILES = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "hf_sft_variants").rglob("*")
    if path.is_file() and path.suffix != ".pyc"
}
DESCRIPTION = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "SECURITY.md"}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """Built in a copy of the tree, where nothing else is: `python -m build` makes the wheel from the other."""
    copy = tmp_path_factory.mktemp("distribution") / "copy"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    for folder in ("hf_sft_variants", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    subprocess.run([sys.executable, "-m", "build", "--no-isolation"], cwd=copy, check=True, capture_output=True)
    return copy / "dist"


def test_wheel_is_the_package(distributions):
    with zipfile.ZipFile(distributions / f"hf_sft_variants-{VERSION}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
    assert {name for name in names if ".dist-info/" not in name} == PACKAGE_FILES
    assert f"hf_sft_variants-{VERSION}.dist-info/licenses/LICENSE" in names


def test_source_distribution(distributions):
    with tarfile.open(distributions / f"hf_sft_variants-{VERSION}.tar.gz") as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    generated = {"PKG-INFO"} | {name for name in names if name.startswith("hf_sft_variants.egg-info/")}
    assert names - generated == PACKAGE_FILES | DESCRIPTION | {"MANIFEST.in", "pyproject.toml", "setup.cfg"}


def test_one_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    assert f"\n## {VERSION}\n" in (ROOT / "CHANGELOG.md").read_text()
