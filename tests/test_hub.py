"""What goes to the Hub: what `SFTTrainer` pushes and, if asked, files with which a run goes on on another machine."""

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
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

import hf_sft_variants
from hf_sft_variants.base.checkpoints import RUN_FILE


NAMES = {"sft_go": "SFTGO", "sftkey": "SFTKey", "poft": "PoFT", "sftmix": "SFTMix"}
STEPS = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "steps"}


class LocalHub:
    """Keeps in a folder what the Hub would keep: stands in for its API."""

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
    """A model that scores."""
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


def make(method, reference, scores, model, tokenizer, rows, folder, **options):
    name = NAMES[{"tfidf": "sft_go", "rho1": "sft_go"}.get(method, method)]
    classes = [getattr(hf_sft_variants, name + part) for part in ("Trainer", "Config")]
    options = {**STEPS, **settings_of(method, reference, scores), **options}
    return make_trainer(*classes, model, tokenizer, rows, folder, **options)


@pytest.mark.parametrize("method", ["tfidf", "rho1", "sftkey", "poft", "sftmix"])
def test_not_asked(method, hub, reference, tiny_model, tokenizer, chat_rows, tmp_path):
    """What is pushed while training, behind it, and of a checkpoint, is what `SFTTrainer` pushes."""
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
    trainer.push_to_hub()
    assert hub.files() == {*expected, f"last-checkpoint/{RUN_FILE}"}
    assert (tmp_path / "run" / "reference" / "model.safetensors").is_file() == (method == "sftmix")
    assert transformers.trainer.hf_api() is hub


class StopAtStep2(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise RuntimeError("the machine is gone")


def is_done_already(*args, **kwargs):
    raise AssertionError("this is not to be done once more")


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        ("tfidf", ["scores/tfidf.npz"]),
        ("rho1", ["scores/*/*.parquet"]),
        ("poft", ["scores/*/*.parquet"]),
        ("sftmix", ["reference/confidence.parquet", "reference/settings.json"]),
    ],
)
def test_asked(method, kept, hub, reference, tiny_model, tokenizer, chat_rows, tmp_path, monkeypatch):
    """The files are on the Hub, without texts, and a clone goes on there as if the machine were still here."""
    arguments = (tiny_model, tokenizer, chat_rows)
    options = {"save_steps": 2, **({"push_confidence": True} if method == "sftmix" else {})}
    unbroken = make(method, reference, tmp_path / "scores", *arguments, tmp_path / "unbroken", **options)
    unbroken.train()

    (tmp_path / "one_machine").mkdir()
    monkeypatch.chdir(tmp_path / "one_machine")
    pushes = {"push_to_hub": True, "hub_strategy": "checkpoint", "callbacks": [StopAtStep2()]}
    with pytest.raises(RuntimeError, match="the machine is gone"):
        make(method, reference, "run/scores", *arguments, "run", **options, **pushes).train()
    files = [Path(file) for file in hub.files() if file.startswith(("scores/", "reference/"))]
    assert [sum(file.match(pattern) for file in files) for pattern in kept] == [1] * len(kept) == [1] * len(files)
    for table in map(pq.read_table, hub.folder.rglob("*.parquet")):
        assert len(table) == 12 and "plus" not in str(table.to_pydict()) + str(table.schema.metadata)

    shutil.copytree(hub.folder, tmp_path / "another_machine" / "run")
    monkeypatch.chdir(tmp_path / "another_machine")
    for work in (
        "poft.reference_scoring.load_reference_model",
        "sft_go.reference_log_probs.load_reference_model",
        "sft_go.tfidf.TokenTfidf.fit",
        "sftmix.reference_phase.ReferenceTrainer.train",
    ):
        monkeypatch.setattr(f"hf_sft_variants.{work}", is_done_already)
    resumed = make(method, reference, "run/scores", *arguments, "run", **options)
    resumed.train(resume_from_checkpoint="run/last-checkpoint")
    expected = unbroken.model.state_dict()
    assert resumed.state.global_step == 4
    assert all(torch.equal(weights, expected[name]) for name, weights in resumed.model.state_dict().items())


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


def test_push_confidence_without_a_reference_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`push_confidence=True` is used with `confidence_source='reference'` only"):
        hf_sft_variants.SFTMixConfig(
            str(tmp_path), use_cpu=True, bf16=False, confidence_split="random", push_confidence=True
        )
