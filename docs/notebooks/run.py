"""
Run notebooks and keep their outputs, without progress bars and warnings.

    python docs/notebooks/run.py docs/notebooks/*.ipynb

With `--folder`, a `quickstart/model` that `hf-sft-variants quickstart` has written there is used again.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient


def run(path: Path, folder: str) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=None,
        skip_cells_with_tag="install",
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": folder}},
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_result(output)]
    nbformat.write(notebook, path)


def is_result(output: dict) -> bool:
    """Whether it is not a warning, a widget or the trainer's progress bar."""
    data = output.get("data", {})
    is_progress = "application/vnd.jupyter.widget-view+json" in data or "<progress" in data.get("text/html", "")
    # DeepSpeed, if installed, logs to stdout
    is_warning = output.get("name") == "stderr" or "[WARNING]" in output.get("text", "")
    return not is_progress and not is_warning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--folder", help="where to run them (default: a temporary folder)")
    options = parser.parse_args()
    for path in options.notebooks:
        with TemporaryDirectory() as temporary:
            run(path, options.folder or temporary)


if __name__ == "__main__":
    main()
