import importlib.util
import logging
import warnings
from pathlib import Path

import pytest

from hf_sft_variants.cli import main
from hf_sft_variants.launch.third_party_warnings import hide_third_party_warnings


@pytest.fixture
def shown():
    """Warnings that get through."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hide_third_party_warnings()
        yield caught


def test_old_names_that_trl_and_peft_read_are_hidden(shown, tiny_model):
    assert tiny_model.is_gradient_checkpointing is False
    tiny_model.gradient_checkpointing_enable()
    tiny_model.gradient_checkpointing_disable()
    assert not shown


def test_syntax_of_the_package_that_makes_the_data_is_hidden(shown):
    spec = importlib.util.find_spec("cellpylib")
    if spec is None:
        pytest.skip("cellpylib is not installed")
    path = Path(spec.origin).with_name("ca_functions.py")
    compile(path.read_text(), path, "exec")
    assert not shown
    compile("'a' is 'b'", "own_program.py", "exec")
    assert [warning.category for warning in shown] == [SyntaxWarning]


def test_other_deprecations_are_shown(shown):
    for name in ("gradient_checkpointing", "tokenizer"):
        text = f"`{name}` is deprecated and will be removed in v6."
        warnings.warn_explicit(text, FutureWarning, "training_args.py", 1, module="transformers.training_args")
    assert [str(warning.message) for warning in shown] == ["`tokenizer` is deprecated and will be removed in v6."]


def test_the_command_hides_only_that_deepspeed_found_no_gpu():
    main(["evaluate", "model", "--thinking-tags", "<a>", "</a>"])  # is refused at once
    texts = ["Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.", "Other"]
    records = [logging.LogRecord("DeepSpeed", logging.WARNING, "", 1, text, (), None) for text in texts]
    assert [bool(logging.getLogger("DeepSpeed").filter(record)) for record in records] == [False, True]
