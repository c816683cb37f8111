"""
Plugin of pytest: the table in docs/compatibility.md, from the marks `cell` and the results of their tests.

The cells of a test travel with its reports, so that they arrive where pytest-xdist collects the results.
"""

from collections import defaultdict
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest


TITLES = {"base": "base", "sft_go": "SFT-GO", "sftkey": "SFTKey", "poft": "PoFT", "sftmix": "SFTMix"}
COLUMNS = {name: title for name, title in TITLES.items() if find_spec(f"hf_sft_variants.{name}")}
# Areas of other names come after these
AREAS = ["Data", "Batches", "Models", "PEFT", "Processes", "Resume", "Control", "TRL's expectations", "Bad input"]
INTRODUCTION = """\
# Compatibility

"yes": tests compare data, losses, gradients or weights with `SFTTrainer`'s or with a slow computation by formula.
"refused": an error that says what to change, before training. Blank: not tested, usually because the trainer has no
such option. `base` is `AnnotatedSFTTrainer`. From "Data" to "PEFT", SFTKey trains on keys, PoFT finds its references'
scores in the rows, and SFTMix pairs at random.

Made by `pytest -m cell --compatibility-table=docs/compatibility.md`.
"""


class Cell(NamedTuple):
    """A line of the table and a column in it."""

    area: str
    name: str
    method: str
    entry: str


def cells_of(item: pytest.Item) -> list[Cell]:
    """The cells that a test is marked with; one without the parameter `method` is about all methods."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    methods = [parameters["method"]] if "method" in parameters else list(COLUMNS)
    return [
        Cell(*mark.args, method, "refused" if mark.kwargs.get("refused") else "yes")
        for mark in item.iter_markers("cell")
        for method in methods
        if method in COLUMNS
    ]


class KeepItems:
    """Plugin that keeps the tests that pytest finds."""

    def pytest_collection_finish(self, session):
        self.items = session.items


def cells_of_all_tests(config: pytest.Config) -> set[Cell]:
    """The cells of the whole suite, whichever of its tests run now."""
    found = KeepItems()
    options = ["--collect-only", "-n0", "-p", "no:terminal", "-p", "no:cacheprovider", f"--rootdir={config.rootpath}"]
    folders = [str(config.rootpath / folder) for folder in config.getini("testpaths") or ["."]]
    pytest.main([*options, *folders], plugins=[found])
    return {cell for item in found.items for cell in cells_of(item)}


def markdown(cells: Iterable[Cell]) -> str:
    """
    The table of each area, its lines by name.

    Raises:
        `ValueError`: If a cell has two entries.
    """
    areas = defaultdict(lambda: defaultdict(dict))
    for area, name, method, entry in cells:
        if areas[area][name].setdefault(method, entry) != entry:
            raise ValueError(f"{name!r} of {area!r} is both proved and refused for {method!r}.")
    lines = [INTRODUCTION]
    for area in sorted(areas, key=lambda area: (AREAS.index(area) if area in AREAS else len(AREAS), area)):
        lines += [f"## {area}", "", row(["", *COLUMNS.values()]), row(["---"] * (1 + len(COLUMNS)))]
        for name in sorted(areas[area], key=str.casefold):
            lines.append(row([name, *(areas[area][name].get(method, "") for method in COLUMNS)]))
        lines.append("")
    return "\n".join(lines)


def row(entries: list[str]) -> str:
    return f"| {' | '.join(entries)} |"


class TableWriter:
    """Gathers the reports of a run and writes the table, if all tests of all cells have passed."""

    def __init__(self, path: Path):
        self.path = path
        self.passed, self.others = set(), set()
        self.missing = set()

    def pytest_runtest_logreport(self, report):
        cells = {Cell(*value) for name, value in report.user_properties if name == "cell"}
        (self.passed if report.passed else self.others).update(cells)  # a skipped test proves nothing

    def pytest_sessionfinish(self, session):
        cells = cells_of_all_tests(session.config)
        self.missing = self.others | (cells - self.passed)
        if cells and not self.missing:
            self.path.write_text(markdown(cells))

    def pytest_terminal_summary(self, terminalreporter):
        problem = f"not written: {len(self.missing)} cells have not passed, such as {min(self.missing, default=None)}"
        terminalreporter.write_line(f"{self.path} is {problem if self.missing else 'written'}")


def pytest_addoption(parser):
    parser.addoption("--compatibility-table", metavar="FILE", type=Path, help="Write the table of the cells there.")


def pytest_configure(config):
    path = config.getoption("compatibility_table")
    if path is not None and not hasattr(config, "workerinput"):  # with pytest-xdist, where the reports arrive
        config.pluginmanager.register(TableWriter(path))


def pytest_collection_modifyitems(items):
    for item in items:
        item.user_properties += [("cell", tuple(cell)) for cell in cells_of(item)]
