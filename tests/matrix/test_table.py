"""The table in the docs: of which tests it is made, and when."""

from pathlib import Path

import pytest
from matrix.table import cells_of_all_tests, markdown


pytest_plugins = ["pytester"]

REPOSITORY = Path(__file__).parents[2]
TESTS = """
    import pytest

    @pytest.mark.cell("Zoo", "lions")
    @pytest.mark.parametrize("method", ["poft", "base"])
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
    advice = "Write it anew: pytest -m cell --compatibility-table=docs/compatibility.md"
    assert (REPOSITORY / "docs" / "compatibility.md").read_text() == table, advice


@pytest.mark.parametrize("processes", [[], ["-n", "1"]], ids=["one", "xdist"])
def test_lines_and_columns(pytester, run, processes):
    run(TESTS, *processes).assert_outcomes(passed=4)
    lines = (pytester.path / "table.md").read_text().splitlines()
    assert lines[9:] == [
        "## Data",
        "",
        "|  | base | SFT-GO | SFTKey | PoFT | SFTMix |",
        "| --- | --- | --- | --- | --- | --- |",
        "| a refusal | refused | refused | refused | refused | refused |",
        "| rows | yes | yes | yes | yes | yes |",
        "",
        "## Zoo",
        "",
        "|  | base | SFT-GO | SFTKey | PoFT | SFTMix |",
        "| --- | --- | --- | --- | --- | --- |",
        "| lions | yes |  |  | yes |  |",
    ]


@pytest.mark.parametrize(
    ("test", "problem"),
    [
        ("@pytest.mark.cell('Data', 'x')\ndef test_it():\n    assert False", "test_it has failed"),
        ("@pytest.mark.cell('Data', 'x')\ndef test_it():\n    pytest.skip('today')", "test_it has skipped"),
        ("@pytest.mark.cell('Data', 'x')\ndef test_it():\n    pass\ndef test_other():\n    assert False", "no cell's"),
        ("def test_it():\n    pass", "no test of a cell was run"),
    ],
    ids=["failed", "skipped", "other_failed", "none"],
)
def test_nothing_is_written_of_what_has_not_passed(pytester, run, test, problem):
    result = run("import pytest\n" + test)
    result.stdout.fnmatch_lines(f"table.md is not written: *{problem}*")
    assert not (pytester.path / "table.md").exists()


@pytest.mark.parametrize("processes", [[], ["-n", "1"]], ids=["one", "xdist"])
def test_nothing_is_written_of_a_part(pytester, run, processes):
    result = run(TESTS, "-k", "test_some", *processes)
    result.stdout.fnmatch_lines("table.md is not written: 10 cells have not been run, such as *'a refusal'*")
    assert not (pytester.path / "table.md").exists()


def test_a_cell_with_two_entries():
    with pytest.raises(ValueError, match="'x' of 'Data' is both proved and refused for 'base'"):
        markdown([("Data", "x", "base", "yes"), ("Data", "x", "base", "refused")])
