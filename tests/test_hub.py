"""Pushes to the Hub: `SFTTrainer`'s files and, if asked, files with which a run goes on on another machine."""

import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from helpers import make_trainer
from huggingface_hub.utils import filter_repo_objects
from methods import METHODS, cases_of, needs
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_sft_variants.base.checkpoints import RUN_FILE


CASES = {"tfidf": "sft_go", "rho1": "sft_go", "sftkey": "sftkey", "poft": "poft", "sftmix": "sftmix"}
STEPS = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "steps"}


class LocalHub:
    """Replaces the Hub's API, and keeps pushed files in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def create_repo(self, name, **options):
        return SimpleNamespace(repo_id=f"user/{name}")

    def upload_folder(self, folder_path, path_in_repo="", ignore_patterns=None, run_as_future=False, **options):
        here = [path.relative_to(folder_path) for path in Path(folder_path).rglob("*") if path.is_file()]
        for path in filter_repo_objects(map(Path.as_posix, here), ignore_patterns=ignore_patterns):
            copy = self.folder / path_in_repo / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path, path), copy)
        done = Future()
        done.set_result(None)
        return done

    def files(self) -> set[str]:
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = LocalHub(tmp_path / "hub")
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    return hub


@pytest.fixture
def reference(tiny_model_factory, tokenizer, tmp_path):
    """A reference model's folder."""
    model = tiny_model_factory()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    model.save_pretrained(tmp_path / "scorer")
    tokenizer.save_pretrained(tmp_path / "scorer")
    return str(tmp_path / "scorer")


def settings_of(method: str, reference: str | None, scores: Path | str) -> dict:
    """The costly form of a method, with its scores in a folder."""
    return {
        "tfidf": {"min_grouped_tokens": 2, "tfidf_file": f"{scores}/tfidf.npz"},
        "rho1": {
            "group_by": "rho1",
            "reference_model": reference,
            "score_cache_dir": str(scores),
            "min_grouped_tokens": 2,
        },
        "sftkey": {"key_pattern": r"#### (?P<key>.+)"},
        "poft": {"reference_models": [reference], "score_cache_dir": str(scores)},
        "sftmix": {},
    }[method]


def make(case, reference, scores, model, tokenizer, rows, folder, **options):
    options = {**STEPS, **settings_of(case, reference, scores), **options}
    return make_trainer(*METHODS[CASES[case]].classes, model, tokenizer, rows, folder, **options)


@pytest.mark.parametrize("method", cases_of(CASES))
def test_not_asked(method, hub, reference, tiny_model, tokenizer, chat_rows, tmp_path):
    """While training, after it, and of a checkpoint, `SFTTrainer`'s files are pushed."""
    options = {"push_to_hub": True, "hub_strategy": "checkpoint", "hub_always_push": True, "save_steps": 2}
    plain = make_trainer(
        SFTTrainer, SFTConfig, tiny_model, tokenizer, chat_rows, tmp_path / "plain", **STEPS, **options
    )
    plain.train()
    plain.push_to_hub()
    expected = hub.files()
    shutil.rmtree(hub.folder)
    trainer = make(
        method, reference, tmp_path / "scores", tiny_model, tokenizer, chat_rows, tmp_path / "run", **options
    )
    trainer.train()
    assert hub.files() == {*expected, f"last-checkpoint/{RUN_FILE}"}
    assert f"trained with {trainer._name}," in (hub.folder / "README.md").read_text()
    trainer.push_to_hub(dataset_name="org/data", tags="extra")
    assert hub.files() == {*expected, f"last-checkpoint/{RUN_FILE}"}
    card = (hub.folder / "README.md").read_text()
    assert "datasets: org/data" in card and all(f"- {tag}\n" in card for tag in ("extra", *trainer._tag_names))
    assert (tmp_path / "run" / "reference" / "model.safetensors").is_file() == (method == "sftmix")
    assert transformers.trainer.hf_api() is hub


class StopAtStep2(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise RuntimeError("the machine is gone")


def is_done_already(*args, **kwargs):
    raise AssertionError("this must not be done again")


KEPT = {
    "tfidf": ["scores/tfidf.npz"],
    "rho1": ["scores/*/*.parquet"],
    "poft": ["scores/*/*.parquet"],
    "sftmix": ["reference/confidence.parquet", "reference/settings.json"],
}
# Work that is not done again
WORK = {
    "tfidf": "sft_go.tfidf.TokenTfidf.fit",
    "rho1": "sft_go.reference_log_probs.load_reference_model",
    "poft": "poft.reference_scoring.load_reference_model",
    "sftmix": "sftmix.reference_phase.ReferenceTrainer.train",
}


@pytest.mark.parametrize("method", cases_of({case: CASES[case] for case in KEPT}))
def test_asked(method, hub, reference, tiny_model, tokenizer, chat_rows, tmp_path, monkeypatch):
    """The files are on the Hub, without texts, and a clone resumes as if it were the same machine."""
    arguments = (tiny_model, tokenizer, chat_rows)
    options = {"save_steps": 2, **({"push_confidence": True} if method == "sftmix" else {})}
    unbroken = make(method, reference, tmp_path / "scores", *arguments, tmp_path / "unbroken", **options)
    unbroken.train()

    (tmp_path / "one_machine").mkdir()
    monkeypatch.chdir(tmp_path / "one_machine")
    pushes = {"push_to_hub": True, "hub_strategy": "checkpoint", "callbacks": [StopAtStep2()]}
    with pytest.raises(RuntimeError, match="the machine is gone"):
        make(method, reference, "run/scores", *arguments, "run", **options, **pushes).train()
    kept = KEPT[method]
    files = [Path(file) for file in hub.files() if file.startswith(("scores/", "reference/"))]
    assert [sum(file.match(pattern) for file in files) for pattern in kept] == [1] * len(kept) == [1] * len(files)
    for table in map(pq.read_table, hub.folder.rglob("*.parquet")):
        assert len(table) == 12 and "plus" not in str(table.to_pydict()) + str(table.schema.metadata)

    shutil.copytree(hub.folder, tmp_path / "another_machine" / "run")
    monkeypatch.chdir(tmp_path / "another_machine")
    monkeypatch.setattr(f"hf_sft_variants.{WORK[method]}", is_done_already)
    resumed = make(method, reference, "run/scores", *arguments, "run", **options)
    resumed.train(resume_from_checkpoint="run/last-checkpoint")
    expected = unbroken.model.state_dict()
    assert resumed.state.global_step == 4
    assert all(torch.equal(weights, expected[name]) for name, weights in resumed.model.state_dict().items())


@needs("sftmix")
def test_confidence_of_a_push_is_used_again(hub, tiny_model, tokenizer, chat_rows, tmp_path):
    """By a run of other settings, as a file."""
    arguments = (tiny_model, tokenizer, chat_rows)
    first = make("sftmix", None, "", *arguments, tmp_path / "run", push_confidence=True)
    first.train()
    first.push_to_hub()
    file = str(hub.folder / "reference" / "confidence.parquet")
    other = {"confidence_source": "file", "confidence_file": file, "mixup_weight": 0.5}
    second = make("sftmix", None, "", *arguments, tmp_path / "other", **other)
    assert second.halves.tolist() == first.halves.tolist()


@needs("sftmix")
def test_push_confidence_without_a_reference_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`push_confidence=True` is only used with `confidence_source='reference'`"):
        METHODS["sftmix"].config_class(
            str(tmp_path), use_cpu=True, bf16=False, confidence_split="random", push_confidence=True
        )
