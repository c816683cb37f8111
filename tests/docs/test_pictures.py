"""Scripts draw the pictures from committed results; each is shown on a page and fits light and dark themes."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest


ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
PICTURES = sorted(IMAGES.glob("*.svg"))
PINNED = re.search(r"^matplotlib==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
WHITE = r"\bfill[:=] ?\"?(?:#fff(?:fff)?|white)\b"


@pytest.fixture(params=PICTURES, ids=lambda picture: picture.name)
def picture(request) -> Path:
    return request.param


def test_each_has_its_script():
    scripts = {script.stem for script in IMAGES.glob("*.py")} - {"drawing"}
    assert scripts == {picture.stem for picture in PICTURES}


def test_is_shown_with_alternative_text(picture):
    pages = [page.read_text() for page in (ROOT / "docs").rglob("*.md")]
    texts = [text for page in pages for text in re.findall(rf"!\[([^\]]+)\]\([\w./]*\b{picture.name}\)", page)]
    assert texts
    assert all(len(text.split()) > 5 for text in texts)


def test_has_no_background(picture):
    """matplotlib draws the background first."""
    text = picture.read_text()
    first = re.search(r'<g id="patch_1">\s*<path [^>]*style="([^"]*)"', text)
    assert first[1] == "fill: none"
    assert not re.search(WHITE, text)


@pytest.mark.skipif(matplotlib.__version__ != PINNED, reason="other versions of matplotlib write other bytes")
def test_is_what_its_script_draws(picture, tmp_path):
    """Drawn again from the results that the script's docstring names."""
    for script in IMAGES.glob("*.py"):
        shutil.copy(script, tmp_path)
    script = tmp_path / f"{picture.stem}.py"
    arguments = re.search(rf"^ +python docs/images/{script.name}(.*)$", script.read_text(), re.MULTILINE)[1]
    subprocess.run([sys.executable, script, *shlex.split(arguments)], cwd=ROOT, check=True)
    assert (tmp_path / picture.name).read_bytes() == picture.read_bytes()
