"""The table in the docs: which tests it is made from, and when."""

from pathlib import Path

import pytest
from matrix.table import COLUMNS, cells_of_all_tests, markdown


pytest_plugins = ["pytester"]

REPOSITORY = Path(__file__).parents[2]
TESTS = """
    import pytest

    @pytest.mark.cell("Zoo", "lions")
    @pytest.mark.parametrize("method", ["base"])
    def test_some(method):
        pass

    @pytest.mark.cell("Data", "rows")
    @pytest.mark.cell("Data", "a refusal", refused=True)
    def test_all():
        pass

    def test_no_cell():
        pass
"""


@pytest.fixture
def run(pytester):
    """Runs a module of tests with the plugin, which writes `table.md`."""
    tests = str(REPOSITORY / "tests")
    pytester.makeconftest(f"import sys; sys.path.append({tests!r}); pytest_plugins = ['matrix.table']")

    def run(module, *options):
        pytester.makepyfile(module)
        return pytester.runpytest("--compatibility-table", "table.md", *options)

    return run


def test_docs_have_every_cell_and_no_other(pytestconfig):
    table = markdown(cells_of_all_tests(pytestconfig))
    advice = "Write it again: pytest -m cell --compatibility-table=docs/compatibility.md"
    assert (REPOSITORY / "docs" / "compatibility.md").read_text() == table, advice


@pytest.mark.parametrize("processes", [[], ["-n", "1"]], ids=["one", "xdist"])
def test_lines_and_columns(pytester, run, processes):
    run(TESTS, *processes).assert_outcomes(passed=3)
    lines = (pytester.path / "table.md").read_text().splitlines()
    titles, columns = " | ".join(COLUMNS.values()), len(COLUMNS)
    assert lines[lines.index("## Data") :] == [
        "## Data",
        "",
        f"|  | {titles} |",
        f"| --- |{' --- |' * columns}",
        f"| a refusal |{' refused |' * columns}",
        f"| rows |{' yes |' * columns}",
        "",
        "## Zoo",
        "",
        f"|  | {titles} |",
        f"| --- |{' --- |' * columns}",
        f"| lions | yes |{'  |' * (columns - 1)}",
    ]


@pytest.mark.parametrize(
    ("test", "options"),
    [
        ("@pytest.mark.cell('Data', 'x')\ndef test_it():\n    assert False", []),
        ("@pytest.mark.cell('Data', 'x')\ndef test_it():\n    pytest.skip('today')", []),
        ("@pytest.mark.cell('Data', 'x')\ndef test_it():\n    pass\ndef test_other():\n    pass", ["-k", "other"]),
    ],
    ids=["failed", "skipped", "a_part"],
)
def test_nothing_is_written_of_what_has_not_passed(pytester, run, test, options):
    result = run("import pytest\n" + test, *options)
    result.stdout.fnmatch_lines(f"table.md is not written: {len(COLUMNS)} cells have not passed, such as *'x'*")
    assert not (pytester.path / "table.md").exists()


def test_a_cell_with_two_entries():
    with pytest.raises(ValueError, match="'x' of 'Data' is both proved and refused for 'base'"):
        markdown([("Data", "x", "base", "yes"), ("Data", "x", "base", "refused")])
