"""Fingerprints follow content alone: place, name of the folder and time of change make no difference."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from hf_sft_variants.base import fingerprints
from hf_sft_variants.base.fingerprints import fingerprint


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.arange(3000.0), "b": torch.zeros(5000)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "_name_or_path": "/here"}))
    return folder


@pytest.fixture(params=["whole", "sampled"], autouse=True)
def size_limit(request, monkeypatch):
    if request.param == "sampled":
        monkeypatch.setattr(fingerprints, "_WHOLE", 1000)
    fingerprints._of_content.cache_clear()


def test_copies_are_the_same(folder, tmp_path):
    before = fingerprint(folder)
    copy = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(folder, copy)
    os.utime(copy / "model.safetensors", (1, 1))
    (copy / "config.json").write_text(json.dumps({"_name_or_path": "/there", "hidden_size": 8}))
    (copy / "checkpoint-1").mkdir()
    (copy / "training.log").write_text("not of the model")
    assert fingerprint(copy) == fingerprint(f"{copy}/") == fingerprint(os.path.relpath(copy)) == before


@pytest.mark.parametrize("name, position", [("a", 0), ("a", -1), ("b", 2500), ("b", -1)])
def test_a_changed_tensor_is_noticed(folder, name, position):
    before = fingerprint(folder)
    tensors = {"a": torch.arange(3000.0), "b": torch.zeros(5000)}
    tensors[name][position] += 1
    save_file(tensors, folder / "model.safetensors")
    assert fingerprint(folder) != before


def test_a_changed_configuration_and_files_that_come_and_go(folder):
    seen = {fingerprint(folder)}
    (folder / "config.json").write_text(json.dumps({"hidden_size": 9}))
    seen.add(fingerprint(folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(fingerprint(folder))
    (folder / "broken.json").write_text("{")
    seen.add(fingerprint(folder))
    assert len(seen) == 4


def test_files_of_other_kinds(tmp_path):
    first, second = tmp_path / "a.npz", tmp_path / "b.npz"
    first.write_bytes(b"x" * 5000 + b"y")
    second.write_bytes(b"x" * 5000 + b"z")
    assert fingerprint(first) != fingerprint(second)
    shutil.copy(first, second)
    assert fingerprint(first) == fingerprint(second)
