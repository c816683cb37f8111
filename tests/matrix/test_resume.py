"""A killed run goes on from its last checkpoint as if nothing had been; another run's checkpoint is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import killed_runs
import pytest
import torch
from datasets import Dataset
from helpers import make_trainer
from killed_runs import RUNS
from methods import METHODS, SFT, Method, with_references
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTConfig

from hf_sft_variants import AnnotatedSFTTrainer, SFTGOConfig, SFTGOTrainer, SFTMixConfig, SFTMixTrainer
from hf_sft_variants.base.checkpoints import RUN_FILE, last_checkpoint
from hf_sft_variants.errors import InputError


PHASES = [
    pytest.param(run.method, name, phase, id=f"{name}-{phase}") for name, run in RUNS.items() for phase in run.phases
]


class StepRecorder(TrainerCallback):
    """Notes the number of each step that is trained."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


@pytest.fixture(scope="module")
def folder(tiny_model_factory, tokenizer, chat_rows, tmp_path_factory):
    """A model with dropout, so that the random numbers count, and rows."""
    folder = tmp_path_factory.mktemp("resume")
    model = tiny_model_factory()
    model.config.attention_dropout = 0.2
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with_references(chat_rows).to_json(folder / "rows.jsonl")
    return folder


@pytest.fixture(scope="module")
def killer(folder):
    """The process that starts runs and lets them be killed, each in a process of its own."""
    script = Path(killed_runs.__file__)
    paths = map(str, (script.parent, script.parents[1], script.parents[2]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, script, folder]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process


def signal_of_killed_run(killer, name, phase):
    killer.stdin.write(json.dumps([name, phase]) + "\n")
    killer.stdin.flush()
    return int(killer.stdout.readline())


@pytest.fixture(scope="module")
def unbroken(folder):
    """Runs that nobody stops, by name; each is made when it is first asked for."""
    return {}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name, weights in first.items():
        assert torch.equal(weights, second[name]), name


def logs(trainer):
    """What each step has logged, but for what counts from the last start: tokens seen, and samples seen again."""
    steps = [log for log in trainer.state.log_history if "loss" in log]
    return [{name: log[name] for name in log.keys() - {"num_tokens", "sft_go/flip_rate"}} for log in steps]


@pytest.mark.cell("Resume", "killed (SIGKILL) at a random step of each phase: the unbroken run's weights, bit for bit")
@pytest.mark.parametrize("method, name, phase", PHASES)
def test_killed_and_resumed(method, name, phase, folder, killer, unbroken):
    if name not in unbroken:
        unbroken[name] = killed_runs.make_trainer(name, folder, folder / name / "unbroken")
        unbroken[name].train()
    assert signal_of_killed_run(killer, name, phase) == signal.SIGKILL
    resumed = killed_runs.make_trainer(name, folder, folder / name / phase)
    recorder = StepRecorder()
    resumed.add_callback(recorder)
    moment, number = RUNS[name].phases[phase][0], RUNS[name].last_number(phase)
    resumed.train(resume_from_checkpoint=moment != "score")
    # Two micro-batches a step, and a checkpoint after each; SFTMix's reference has as many steps before
    last_step = {"step": (number - 1) // 2, "save": number - 1}.get(moment, 0)
    steps_before = 6 if name == "two_phases" else 0
    assert recorder.steps == list(range(max(last_step - steps_before, 0) + 1, 7))
    assert_same_weights(resumed.model.state_dict(), unbroken[name].model.state_dict())
    assert logs(resumed) == logs(unbroken[name])


def make(method: Method, model, tokenizer, rows, folder, **options):
    """The method as it is used, with a checkpoint after each of three steps."""
    options = {
        "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, **method.options, **options,
    }  # fmt: skip
    return make_trainer(*method.classes, model, tokenizer, rows, folder, **options)


def checkpoints_in(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def weights_in(checkpoint):
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def rows(chat_rows):
    return with_references(chat_rows)


@pytest.fixture(scope="module")
def checkpoints(tiny_model_factory, tokenizer, rows, tmp_path_factory):
    """The checkpoint after one step of each method, and of `SFTTrainer`."""
    found = {}
    for name, method in {**METHODS, "plain": Method(*SFT)}.items():
        folder = tmp_path_factory.mktemp(name)
        trainer = make(method, tiny_model_factory(), tokenizer, rows, folder, max_steps=1)
        trainer.train()
        found[name] = folder / "checkpoint-1"
    return found


@pytest.mark.parametrize("method", METHODS)
class TestWhatIsSaved:
    @pytest.mark.cell("Resume", "load_best_model_at_end, save_total_limit: the best and the last checkpoint are kept")
    def test_best_and_last(self, method, tiny_model, tokenizer, rows, tmp_path, caplog):
        # The model gets better, so that of the highest losses the first is the best
        options = {"metric_for_best_model": "eval_nll", "greater_is_better": True, "load_best_model_at_end": True}
        trainer = make(
            METHODS[method], tiny_model, tokenizer, rows, tmp_path, eval_dataset=rows, eval_strategy="steps",
            eval_steps=1, save_total_limit=2, **options,
        )  # fmt: skip
        assert "`metric_for_best_model='eval_nll'` with `greater_is_better=True` calls the model with" in caplog.text
        trainer.train()
        evaluations = [log["eval_nll"] for log in trainer.state.log_history if "eval_nll" in log]
        assert trainer.state.best_metric == evaluations[0] == max(evaluations) > min(evaluations)
        assert checkpoints_in(tmp_path) == ["checkpoint-1", "checkpoint-3"]
        best = weights_in(tmp_path / "checkpoint-1")
        last = weights_in(tmp_path / "checkpoint-3")
        assert_same_weights({name: trainer.model.state_dict()[name] for name in best}, best)
        assert not all(torch.equal(weights, last[name]) for name, weights in best.items())

    @pytest.mark.cell("Resume", "save_only_model: SFTTrainer's files, and a warning when resumed")
    def test_weights_alone(self, method, tiny_model, tokenizer, rows, checkpoints, tmp_path, caplog):
        common, options = (tiny_model, tokenizer, rows, tmp_path), {"save_only_model": True}
        unbroken = make(METHODS[method], *common, **options)
        unbroken.train()
        plain = {path.name for path in checkpoints["plain"].iterdir()}
        dropped = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
        assert {path.name for path in (tmp_path / "checkpoint-1").iterdir()} == plain - dropped | {RUN_FILE}
        resumed = make(METHODS[method], *common, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert "checkpoint-1 has the weights alone (`save_only_model=True`): the optimizer and the" in caplog.text
        assert logs(resumed)[1]["loss"] == logs(unbroken)[1]["loss"]  # the next batches, in the same phase
        assert logs(resumed)[1]["learning_rate"] != logs(unbroken)[1]["learning_rate"]


def assert_refused(trainer, checkpoint, message):
    before = {name: weights.clone() for name, weights in trainer.model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 0
    assert_same_weights(before, trainer.model.state_dict())


@dataclass
class WeightedConfig(SFTConfig):
    weight: float = 1.0


class WeightedTrainer(AnnotatedSFTTrainer):
    """A variant of a user's own."""

    config_class = WeightedConfig

    def compute_annotated_loss(self, batch):
        return self.args.weight * super().compute_annotated_loss(batch)


OTHER_SETTINGS = {
    "base": {"weight": 2.0},
    "sft_go": {
        "worst_group_weight": 0.5, "worst_group_schedule": "linear", "important_fraction": 0.25,
        "group_scope": "micro_batch", "sample_weighting": "uniform", "min_grouped_tokens": 3,
    },
    "sftkey": {"stages": ["full"], "full_loss_weight": 0.5, "key_tags_in_loss": False, "key_delimiter": "####"},
    "poft": {"beta": 1.0, "gamma": 0.5, "preference_weighting": "constant", "reference_models": ["a", "b"]},
    "sftmix": {"mixup_weight": 0.5, "mixup_alpha": 1.0, "ntp_weight": 0.0, "confidence_split": "confidence"},
}  # fmt: skip


class TestAnotherRunIsRefused:
    @pytest.mark.cell("Resume", "a checkpoint of another method, or of SFTTrainer", refused=True)
    @pytest.mark.parametrize("method", METHODS)
    def test_another_method(self, method, tiny_model, tokenizer, rows, checkpoints, tmp_path):
        trainer = make(METHODS[method], tiny_model, tokenizer, rows, tmp_path)
        own = "SFTTrainer" if method == "base" else type(trainer).__name__
        for other, checkpoint in checkpoints.items():
            maker = "SFTTrainer" if other in ("plain", "base") else METHODS[other].trainer_class.__name__
            if maker == own:
                assert trainer.checkpoint_to_resume(str(checkpoint)) == str(checkpoint)
            else:
                assert_refused(trainer, checkpoint, f"checkpoint-1 was made by {maker}, but this is {own}. Resume wi")

    @pytest.mark.cell("Resume", "a checkpoint of other settings of the method", refused=True)
    @pytest.mark.parametrize("method", METHODS)
    def test_another_setting(self, method, tiny_model, tokenizer, rows, checkpoints, tmp_path):
        used, checkpoint = METHODS[method], checkpoints[method]
        if method == "base":
            used, checkpoint = Method(WeightedTrainer, WeightedConfig), tmp_path / "checkpoint-1"
            make(used, tiny_model, tokenizer, rows, tmp_path, max_steps=1).train()
        for name, value in OTHER_SETTINGS[method].items():
            changes = {name: value}
            if name == "key_delimiter":
                changes["key_pattern"] = None
            trainer = make(used, tiny_model, tokenizer, rows, tmp_path, **changes)
            before = getattr(used.config_class(str(tmp_path), use_cpu=True, bf16=False, **used.options), name)
            message = rf"other settings: .*`{name}` was {before!r}, is {value!r}".replace("[", r"\[")
            assert_refused(trainer, checkpoint, message)

    def test_what_may_change(self, tiny_model, tokenizer, rows, checkpoints, tmp_path):
        for method, options in {
            "sft_go": {"score_cache_dir": "elsewhere", "score_batch_tokens": 1, "learning_rate": 1.0},
            "sftkey": {"answer_eval_max_new_tokens": 3},
            "poft": {"score_cache_dir": "elsewhere", "reference_batch_tokens": 1},
        }.items():
            trainer = make(METHODS[method], tiny_model, tokenizer, rows, tmp_path, **options)
            assert trainer.checkpoint_to_resume(str(checkpoints[method])) == str(checkpoints[method])

    def test_a_file_or_a_model_elsewhere(self, tiny_model, tokenizer, rows, tmp_path, monkeypatch):
        """Their content counts: neither how a path is spelt nor where it leads to."""
        frequencies, scorer = tmp_path / "tfidf.npz", tmp_path / "scorer"
        tiny_model.save_pretrained(scorer)
        tokenizer.save_pretrained(scorer)
        tfidf = Method(SFTGOTrainer, SFTGOConfig, {"min_grouped_tokens": 2})
        rho1 = Method(SFTGOTrainer, SFTGOConfig, {**tfidf.options, "group_by": "rho1", "score_cache_dir": "cache"})
        monkeypatch.chdir(tmp_path)
        for method, field, path in ((tfidf, "tfidf_file", frequencies), (rho1, "reference_model", scorer)):
            common = (tiny_model, tokenizer, rows, tmp_path / field)
            make(method, *common, max_steps=1, **{field: str(path)}).train()
            checkpoint = tmp_path / field / "checkpoint-1"
            moved = shutil.move(path, tmp_path / f"moved_{path.name}")
            for spelling in (
                moved.name,
                f"./{moved.name}",
                f"{moved}/" if moved.is_dir() else f"..//{tmp_path.name}/{moved.name}",
            ):
                trainer = make(method, *common, **{field: spelling})
                assert trainer.checkpoint_to_resume(str(checkpoint)) == str(checkpoint)
            assert str(tmp_path) not in (checkpoint / RUN_FILE).read_text()
            if moved.is_dir():
                tiny_model.model.norm.weight.data[0] += 1
                tiny_model.save_pretrained(moved)
            else:
                moved.unlink()
                make(method, tiny_model, tokenizer, rows.select(range(8)), tmp_path, **{field: str(moved)})
            trainer = make(method, *common, **{field: str(moved)})
            assert_refused(trainer, checkpoint, f"other settings: `{field}` was {{'name': '{path.name}', 'content': ")

    @pytest.mark.cell("Resume", "a checkpoint of another data set", refused=True)
    @pytest.mark.parametrize("method", METHODS)
    def test_other_examples(self, method, tiny_model, tokenizer, rows, checkpoints, tmp_path):
        make_method, checkpoint = METHODS[method], checkpoints[method]
        others = [
            (rows.select(range(10)), {}, "with 12 training examples, and the 10 of this run are others"),
            (Dataset.from_list([rows[3], *rows.select(range(1, 12))]), {}, "and the 12 of this run are others"),
            (rows, {"max_length": 44}, r"the same data set, tokenizer, chat template and `max_length`; or set"),
        ]
        for other_rows, options, message in others:
            trainer = make(make_method, tiny_model, tokenizer, other_rows, tmp_path, **options)
            assert_refused(trainer, checkpoint, message)
        trainer = make(make_method, tiny_model, tokenizer, others[0][0], tmp_path, ignore_data_skip=True)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 3

    def test_another_reference(self, tiny_model, tokenizer, rows, tmp_path):
        method = Method(SFTMixTrainer, SFTMixConfig)
        options = {"confidence_checkpoints": [1], "max_steps": 2}
        make(method, tiny_model, tokenizer, rows, tmp_path, **options).train()
        shutil.rmtree(tmp_path / "checkpoint-2"), shutil.rmtree(tmp_path / "checkpoint-1")
        message = r"reference that was trained with `confidence_checkpoints=\[1\]`, but now it is \[2\]. Remove the"
        for resume in (True, None):
            trainer = make(method, tiny_model, tokenizer, rows, tmp_path, **{**options, "confidence_checkpoints": [2]})
            with pytest.raises(InputError, match=message):
                trainer.train(resume_from_checkpoint=resume)
        (tmp_path / "reference" / "confidence.parquet").unlink()
        trainer.train()
        assert json.loads((tmp_path / "reference" / "settings.json").read_text())["confidence_checkpoints"] == [2]

    def test_files_that_are_not_whole(self, tiny_model, tokenizer, rows, checkpoints, tmp_path):
        trainer = make(METHODS["poft"], tiny_model, tokenizer, rows, tmp_path)
        with pytest.raises(InputError, match="`resume_from_checkpoint=True`, but `output_dir=.*` has no checkpoint"):
            trainer.train(resume_from_checkpoint=True)
        assert_refused(trainer, tmp_path / "nowhere", "nowhere'` is no whole checkpoint: it has no readable trainer_s")
        for step in (1, 2):
            shutil.copytree(checkpoints["poft"], tmp_path / f"checkpoint-{step}")
        state = tmp_path / "checkpoint-2" / "trainer_state.json"
        state.write_text(state.read_text()[:100])
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
        assert_refused(trainer, tmp_path / "checkpoint-2", "checkpoint-2'` is no whole checkpoint")
        for text in ("{", "[]", '{"trainer": "PoFTTrainer"}', '{"trainer": "PoFTTrainer", "settings": 3}'):
            (tmp_path / "checkpoint-1" / RUN_FILE).write_text(text)
            assert_refused(trainer, tmp_path / "checkpoint-1", rf"{RUN_FILE} can't be read \(.*\). Resume from anothe")

    def test_a_stream_can_not_be_compared(self, tiny_model, tokenizer, rows, tmp_path):
        stream = rows.to_iterable_dataset()
        make(METHODS["base"], tiny_model, tokenizer, stream, tmp_path, max_steps=1).train()
        assert json.loads((tmp_path / "checkpoint-1" / RUN_FILE).read_text())["examples"] is None
        trainer = make(METHODS["base"], tiny_model, tokenizer, stream, tmp_path, eval_dataset={"train": rows})
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 3
