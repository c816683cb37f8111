"""The README's examples run, and the names and links in it exist."""

import ast
import re
from pathlib import Path

import pytest
from helpers import make_trainer
from trl import SFTConfig

import hf_sft_variants


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON_BLOCKS, OF_A_VARIANT = (
    re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for text in (README, (ROOT / "docs" / "your_own_variant.md").read_text())
)


def test_it_is_short():
    assert len(README.split()) <= 900


def test_variant_runs(tiny_model, tokenizer, token_rows, tmp_path):
    (code,) = [block for block in OF_A_VARIANT if "AnnotatedSFTTrainer" in block]
    assert len(code.splitlines()) <= 30
    namespace = {}
    exec(code[: code.index("trainer =")], namespace)
    trainer_class = namespace["LateTokensTrainer"]
    trainer = make_trainer(trainer_class, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path, max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] < trainer.state.log_history[0]["nll"]  # its weights are below one


@pytest.mark.parametrize("code", [*PYTHON_BLOCKS, *OF_A_VARIANT])
def test_imported_names_are_there(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "hf_sft_variants":
            for name in node.names:
                assert hasattr(hf_sft_variants, name.name)


def test_named_files_are_there():
    for name in re.findall(r"(?:recipes|docs|benchmarks)/[\w./]+\.(?:yaml|png|py)", README):
        assert (ROOT / name).is_file(), name


def test_links_lead_somewhere():
    """The build of the site looks at those of its own pages."""
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", README)
    assert links
    for path, anchor in links:
        assert (ROOT / path).exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / (path or "README.md")).read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_no_placeholder_is_left():
    assert not re.search(r"\b[A-Z]{5,}\b", re.sub(r"`[^`]*`|\]\([^)]*\)", "", README))
