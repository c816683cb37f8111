"""Every notebook runs on a few rows, and shows the outputs of a full run."""

import re
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
from methods import METHODS


ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))}
REPOSITORY = "hf-sft-variants/hf_sft_variants"
FOLDERS_OF_A_MACHINE = r"/(?:home|root|tmp|work|content|Users|usr)/"

each_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def code_cells(name: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


@each_notebook
def test_runs(name, tiny_model, tokenizer, tmp_path, monkeypatch):
    """Runs in this process with a tiny model; only the installation is an IPython command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMALL_RUN", "1")
    tiny_model.save_pretrained("quickstart/model")
    tokenizer.save_pretrained("quickstart/model")
    namespace = {}
    for cell in code_cells(name)[1:]:
        exec(compile(cell.source, f"{name}.ipynb", "exec"), namespace)


def test_there_is_one_for_each_published_method():
    assert NOTEBOOKS.keys() == {"compare", *METHODS} - {"base", "weighted"}


@each_notebook
def test_it_opens_in_colab(name):
    first = read(name).cells[0].source
    assert "https://colab.research.google.com/assets/colab-badge.svg" in first
    assert f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/docs/notebooks/{name}.ipynb" in first


@each_notebook
def test_the_first_code_installs_from_the_repository(name):
    install, *others = code_cells(name)
    assert install.metadata.tags == ["install"]
    (extras,) = re.search(
        rf'^%pip install -q "hf_sft_variants\[([\w,]+)\] @ git\+https://github\.com/{REPOSITORY}"$',
        install.source,
        re.M,
    ).groups()
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert set(extras.split(",")) <= setup["options.extras_require"].keys()
    assert not any("install" in cell.metadata.get("tags", []) for cell in others)


@pytest.mark.parametrize("name", sorted(NOTEBOOKS.keys() - {"compare"}))
def test_the_change_it_shows_is_made(name):
    texts = [cell.source for cell in read(name).cells if cell.cell_type == "markdown"]
    (change,) = re.findall(r"^\+ (.+)$", "\n".join(texts), re.MULTILINE)
    assert any(change in cell.source.splitlines() for cell in code_cells(name))


@each_notebook
def test_it_shows_a_whole_run(name):
    cells = code_cells(name)[1:]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert any("image/png" in output.get("data", {}) for output in outputs)


@each_notebook
def test_it_shows_results_only(name):
    for cell in code_cells(name):
        for output in cell.outputs:
            assert output.get("name") != "stderr"
            shown = output.get("text", "") + "".join(
                text for kind, text in output.get("data", {}).items() if kind.startswith("text/")
            )
            assert "warning" not in shown.lower() and "<progress" not in shown
            assert not re.search(FOLDERS_OF_A_MACHINE, shown)
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


@each_notebook
def test_it_is_small(name):
    assert NOTEBOOKS[name].stat().st_size < 300_000
