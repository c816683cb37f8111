"""Checkpoints: what is saved, and that those of another run are refused."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from helpers import make_trainer
from methods import METHODS, SFT, Method, every_method, needs
from safetensors.torch import load_file
from trl import SFTConfig

from hf_sft_variants import AnnotatedSFTTrainer
from hf_sft_variants.base.checkpoints import RUN_FILE, last_checkpoint
from hf_sft_variants.errors import InputError


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name, weights in first.items():
        assert torch.equal(weights, second[name]), name


def logs(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


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
def rows(scored_chat_rows):
    return scored_chat_rows


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


@every_method
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
        assert "checkpoint-1 has only the weights (`save_only_model=True`): the optimizer and the" in caplog.text
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
    """A user's own variant."""

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
    "weighted": {"answer_weight": 2.0, "weight_normalization": "tokens", "prompt_weight": 0.5},
}  # fmt: skip


MAY_CHANGE = {
    "sft_go": {"score_cache_dir": "elsewhere", "score_batch_tokens": 1, "learning_rate": 1.0},
    "sftkey": {"answer_eval_max_new_tokens": 3},
    "poft": {"score_cache_dir": "elsewhere", "reference_batch_tokens": 1},
}


class TestAnotherRunIsRefused:
    @pytest.mark.cell("Resume", "checkpoint of another method, or of SFTTrainer", refused=True)
    @every_method
    def test_another_method(self, method, tiny_model, tokenizer, rows, checkpoints, tmp_path):
        trainer = make(METHODS[method], tiny_model, tokenizer, rows, tmp_path)
        own = "SFTTrainer" if method == "base" else type(trainer).__name__
        for other, checkpoint in checkpoints.items():
            maker = "SFTTrainer" if other in ("plain", "base") else METHODS[other].trainer_class.__name__
            if maker == own:
                assert trainer.checkpoint_to_resume(str(checkpoint)) == str(checkpoint)
            else:
                assert_refused(trainer, checkpoint, f"checkpoint-1 was made by {maker}, but this is {own}. Resume wi")

    @pytest.mark.cell("Resume", "checkpoint made with other settings of the method", refused=True)
    @every_method
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
            message = rf"different settings: .*`{name}` was {before!r}, is now {value!r}".replace("[", r"\[")
            assert_refused(trainer, checkpoint, message)

    @pytest.mark.parametrize("method", [method for method in MAY_CHANGE if method in METHODS])
    def test_what_may_change(self, method, tiny_model, tokenizer, rows, checkpoints, tmp_path):
        trainer = make(METHODS[method], tiny_model, tokenizer, rows, tmp_path, **MAY_CHANGE[method])
        assert trainer.checkpoint_to_resume(str(checkpoints[method])) == str(checkpoints[method])

    @needs("sft_go")
    @pytest.mark.parametrize(
        ("field", "options"),
        [("tfidf_file", {}), ("reference_model", {"group_by": "rho1", "score_cache_dir": "cache"})],
    )
    def test_a_file_or_a_model_elsewhere(self, field, options, tiny_model, tokenizer, rows, tmp_path, monkeypatch):
        """Their content counts, but not where they are or how their path is written."""
        monkeypatch.chdir(tmp_path)
        path = tmp_path / "first"
        if field == "reference_model":
            tiny_model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        common = (tiny_model, tokenizer, rows, tmp_path / "run")
        make(METHODS["sft_go"], *common, max_steps=1, **options, **{field: str(path)}).train()
        checkpoint = tmp_path / "run" / "checkpoint-1"
        moved = shutil.move(path, tmp_path / "moved")
        for spelling in ("moved", "./moved", f"{moved}/" if moved.is_dir() else f"..//{tmp_path.name}/moved"):
            trainer = make(METHODS["sft_go"], *common, **options, **{field: spelling})
            assert trainer.checkpoint_to_resume(str(checkpoint)) == str(checkpoint)
        assert str(tmp_path) not in (checkpoint / RUN_FILE).read_text()
        if moved.is_dir():
            tiny_model.model.norm.weight.data[0] += 1
            tiny_model.save_pretrained(moved)
        else:
            moved.unlink()
            make(METHODS["sft_go"], tiny_model, tokenizer, rows.select(range(8)), tmp_path, **{field: str(moved)})
        trainer = make(METHODS["sft_go"], *common, **options, **{field: str(moved)})
        assert_refused(trainer, checkpoint, f"different settings: `{field}` was {{'name': 'first', 'content': ")

    @pytest.mark.cell("Resume", "checkpoint of another data set", refused=True)
    @every_method
    def test_other_examples(self, method, tiny_model, tokenizer, rows, checkpoints, tmp_path):
        make_method, checkpoint = METHODS[method], checkpoints[method]
        others = [
            (rows.select(range(10)), {}, "with 12 training examples, and the 10 of this run differ"),
            (Dataset.from_list([rows[3], *rows.select(range(1, 12))]), {}, "and the 12 of this run differ"),
            (
                rows,
                {"max_length": 44},
                r"the same data set and annotations, tokenizer, chat template and `max_length`, or set",
            ),
        ]
        for other_rows, options, message in others:
            trainer = make(make_method, tiny_model, tokenizer, other_rows, tmp_path, **options)
            assert_refused(trainer, checkpoint, message)
        trainer = make(make_method, tiny_model, tokenizer, others[0][0], tmp_path, ignore_data_skip=True)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 3

    @needs("sftmix")
    def test_another_reference(self, tiny_model, tokenizer, rows, tmp_path):
        method = Method(*METHODS["sftmix"].classes)
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
        name, method = list(METHODS.items())[-1]
        trainer = make(method, tiny_model, tokenizer, rows, tmp_path)
        with pytest.raises(InputError, match="`resume_from_checkpoint=True`, but `output_dir=.*` has no checkpoint"):
            trainer.train(resume_from_checkpoint=True)
        assert_refused(trainer, tmp_path / "nowhere", "nowhere'` is not a complete checkpoint: it has no readable")
        for step in (1, 2):
            shutil.copytree(checkpoints[name], tmp_path / f"checkpoint-{step}")
        state = tmp_path / "checkpoint-2" / "trainer_state.json"
        state.write_text(state.read_text()[:100])
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
        assert_refused(trainer, tmp_path / "checkpoint-2", "checkpoint-2'` is not a complete checkpoint")
        maker = f'"trainer": "{method.trainer_class.__name__}"'
        for text in ("{", "[]", f"{{{maker}}}", f'{{{maker}, "settings": 3}}'):
            (tmp_path / "checkpoint-1" / RUN_FILE).write_text(text)
            assert_refused(trainer, tmp_path / "checkpoint-1", rf"{RUN_FILE} can't be read \(.*\). Resume from anothe")

    def test_a_stream_can_not_be_compared(self, tiny_model, tokenizer, rows, tmp_path):
        stream = rows.to_iterable_dataset()
        make(METHODS["base"], tiny_model, tokenizer, stream, tmp_path, max_steps=1).train()
        assert json.loads((tmp_path / "checkpoint-1" / RUN_FILE).read_text())["examples"] is None
        trainer = make(METHODS["base"], tiny_model, tokenizer, stream, tmp_path, eval_dataset={"train": rows})
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 3
