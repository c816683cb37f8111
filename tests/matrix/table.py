"""
Plugin of pytest: the table in docs/compatibility.md, made of the marks `cell` and of the results of their tests.

The cells of a test travel with its reports, so that they arrive where pytest-xdist collects the results.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest


COLUMNS = {"base": "base", "sft_go": "SFT-GO", "sftkey": "SFTKey", "poft": "PoFT", "sftmix": "SFTMix"}
# Areas of other names come after these
AREAS = ["Data", "Batches", "Models", "PEFT", "Processes", "Resume", "Control", "TRL's expectations", "Bad input"]
INTRODUCTION = """\
# Compatibility

A "yes" is proved by figures: data, losses, gradients or weights equal `SFTTrainer`'s or a slow computation by formula;
"refused" is an error in words that comes before training. A blank is not tested, most often because the trainer has no
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
    """What the marks of a test say; one without the parameter `method` is about all methods."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    methods = [parameters["method"]] if "method" in parameters else list(COLUMNS)
    return [
        Cell(*mark.args, method, "refused" if mark.kwargs.get("refused") else "yes")
        for mark in item.iter_markers("cell")
        for method in methods
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
    """Gathers the reports of a run and writes the table, if the tests of all cells have passed."""

    def __init__(self, path: Path):
        self.path = path
        self.cells = set()
        self.problem = None

    def pytest_runtest_logreport(self, report):
        cells = [Cell(*value) for name, value in report.user_properties if name == "cell"]
        self.cells.update(cells)
        if cells and report.outcome != "passed":  # a skipped test proves nothing
            self.problem = f"{report.nodeid} has {report.outcome}"

    def pytest_sessionfinish(self, session, exitstatus):
        if not self.cells:
            self.problem = "no test of a cell was run"
        elif exitstatus != pytest.ExitCode.OK and self.problem is None:
            self.problem = "a test that is no cell's has failed, or the run was stopped"
        if self.problem is None:
            missing = cells_of_all_tests(session.config) - self.cells
            if missing:
                self.problem = f"{len(missing)} cells have not been run, such as {min(missing)}"
        if self.problem is None:
            self.path.write_text(markdown(self.cells))

    def pytest_terminal_summary(self, terminalreporter):
        written = "is written" if self.problem is None else f"is not written: {self.problem}"
        terminalreporter.write_line(f"{self.path} {written}")


def pytest_addoption(parser):
    parser.addoption("--compatibility-table", metavar="FILE", type=Path, help="Write the table of the cells there.")


def pytest_configure(config):
    path = config.getoption("compatibility_table")
    if path is not None and not hasattr(config, "workerinput"):  # with pytest-xdist, where the reports arrive
        config.pluginmanager.register(TableWriter(path))


def pytest_collection_modifyitems(items):
    for item in items:
        item.user_properties += [("cell", tuple(cell)) for cell in cells_of(item)]
