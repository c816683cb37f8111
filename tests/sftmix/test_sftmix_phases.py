"""The whole run: reference and mixup, killed anywhere and resumed; and confidence seen in training itself."""

import copy
import json
import math
import os
import pickle
import re
import shutil
import weakref
from functools import partial

import helpers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import SMALL
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from hf_sft_variants import ConfidenceTrackingCallback, SFTMixConfig, SFTMixTrainer
from hf_sft_variants.base.example_keys import EXAMPLE_KEY
from hf_sft_variants.errors import InputError
from hf_sft_variants.sftmix.reference_phase import ReferenceTrainer
from hf_sft_variants.sftmix.reference_settings import describe_reference, describe_start, require_same_reference


# Twelve rows: three steps in an epoch, six in a run
RUN = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 2}


class Killed(Exception):
    """Stands in for the signal."""


def kill_at(number, monkeypatch):
    """Let the process end in this training step, counted over both phases."""
    calls, training_step = [], SFTTrainer.training_step

    def counted(self, *args, **kwargs):
        calls.append(type(self))
        if len(calls) == number:
            raise Killed
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", counted)
    return calls


def lora():
    return LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2)


# Adapters are changed by the trainer that gets them
KINDS = {
    "full": dict,
    "lora": lambda: {"peft_config": lora()},
    "packed": lambda: {"packing": True, "max_length": 60},
}


def train(model, tokenizer, rows, folder, resume=None, **options):
    """A run as a process of its own would do it."""
    set_seed(len(os.listdir(folder)) if folder.exists() else 99)  # the start must not depend on what was before
    options = {"save_strategy": "steps", **RUN, **options}
    trainer = helpers.make_trainer(SFTMixTrainer, SFTMixConfig, model, tokenizer, rows, folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_weights(first, second):
    first, second = (x.model.state_dict() if isinstance(x, SFTTrainer) else x.state_dict() for x in (first, second))
    assert first.keys() == second.keys()
    for name, weights in first.items():
        assert torch.equal(weights, second[name]), name


def save_start(model, tokenizer, folder):
    model.config.update({"hidden_size": 64, "head_dim": 16})  # less, and bitsandbytes can't compute
    type(model)(model.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def four_bits():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


class TestTwoPhases:
    @pytest.mark.parametrize("packing", [False, True])
    def test_reference_is_the_baseline_and_mixup_starts_anew(
        self, tiny_model, tokenizer, chat_rows, tmp_path, packing
    ):
        arguments = (tiny_model, tokenizer, chat_rows)
        options = {"packing": packing, "max_length": 60, "save_strategy": "no"}
        ours = train(*arguments, tmp_path / "ours", **options)
        plain = helpers.make_trainer(SFTTrainer, SFTConfig, *arguments, tmp_path / "plain", **{**RUN, **options})
        plain.add_callback(ConfidenceTrackingCallback(plain, tmp_path / "plain" / "confidence.parquet"))
        plain.train()
        reference = tmp_path / "ours" / "reference"
        assert_same_weights(AutoModelForCausalLM.from_pretrained(reference), plain)
        assert (reference / "tokenizer.json").is_file() and (reference / "trainer_state.json").is_file()
        by_ours, by_plain = (pq.read_table(f / "confidence.parquet") for f in (reference, tmp_path / "plain"))
        for name in by_plain.column_names[1:]:
            same = sorted(by_ours[name].to_pylist(), key=str), sorted(by_plain[name].to_pylist(), key=str)
            assert same[0] == (pytest.approx(same[1], rel=1e-5) if "half" not in name else same[1])
        # The same as a run with the file, which knows no reference phase
        source = {"confidence_source": "file", "confidence_file": str(reference / "confidence.parquet")}
        from_file = train(*arguments, tmp_path / "file", **options, **source)
        assert torch.equal(ours.halves, from_file.halves) and ours.halves.sum() == 6
        assert_same_weights(ours, from_file)
        assert_same_weights(tiny_model, helpers.make_trainer(SFTTrainer, SFTConfig, *arguments, tmp_path))

    @pytest.mark.parametrize("is_quantized", [False, True])
    @pytest.mark.parametrize("by_name", [False, True])
    def test_lora(self, tiny_model, tokenizer, chat_rows, tmp_path, by_name, is_quantized):
        """The reference is the adapter that `SFTTrainer` trains, be the model loaded again or copied."""
        start = save_start(tiny_model, tokenizer, tmp_path / "start")
        quantization = four_bits() if is_quantized else None
        for trainer_class, config_class in ((SFTMixTrainer, SFTMixConfig), (SFTTrainer, SFTConfig)):
            folder = tmp_path / trainer_class.__name__
            load = partial(AutoModelForCausalLM.from_pretrained, quantization_config=quantization)
            trainer = trainer_class(
                start if by_name else load(start),
                config_class(str(folder), **SMALL, **RUN, save_strategy="no"),
                train_dataset=chat_rows,
                processing_class=tokenizer,
                peft_config=lora(),
                quantization_config=quantization if by_name else None,
            )
            if is_quantized and trainer_class is SFTTrainer:
                # On CPUs with bfloat16 bitsandbytes rounds the scales of a model that is evaluated
                trainer.add_callback(ConfidenceTrackingCallback(trainer, tmp_path / "confidence.parquet"))
            trainer.train()
            trainer.save_model()
        mixed, reference, plain = (
            load_file(tmp_path / folder / "adapter_model.safetensors")
            for folder in ("SFTMixTrainer", "SFTMixTrainer/reference", "SFTTrainer")
        )
        assert all(torch.equal(weights, plain[name]) for name, weights in reference.items())
        assert not all(torch.equal(weights, plain[name]) for name, weights in mixed.items())

    def test_the_reference_has_the_dtype_of_the_adapter(self, tiny_model, tokenizer, chat_rows, tmp_path):
        """fp16 training on a GPU can't use the bfloat16 that TRL gives the adapter of a quantized model."""
        trainer = SFTMixTrainer(
            save_start(tiny_model, tokenizer, tmp_path / "start"),
            SFTMixConfig(str(tmp_path), **SMALL, **RUN, save_strategy="no"),
            train_dataset=chat_rows,
            processing_class=tokenizer,
            peft_config=lora(),
            quantization_config=four_bits(),
        )
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        assert {parameter.dtype for parameter in trained} == {torch.bfloat16}
        for parameter in trained:
            parameter.data = parameter.data.float()
        trainer.train()
        weights = load_file(tmp_path / "reference" / "adapter_model.safetensors")
        assert {values.dtype for values in weights.values()} == {torch.float32}

    def test_another_reference_model(self, tiny_model, tokenizer, chat_rows, token_rows, tmp_path):
        from fixtures.small_tokenizers import byte_fallback

        other_tokenizer = byte_fallback()
        other_tokenizer.pad_token, other_tokenizer.chat_template = "<unk>", tokenizer.chat_template
        config = GPT2Config(vocab_size=len(other_tokenizer), n_positions=256, n_embd=16, n_layer=1, n_head=2)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "other")
        other_tokenizer.save_pretrained(tmp_path / "other")
        options = {"reference_model": str(tmp_path / "other"), "confidence_checkpoints": [2, 5]}
        rows = chat_rows.map(as_text, remove_columns=chat_rows.column_names)
        ours = train(tiny_model, tokenizer, rows, tmp_path / "run", **options)
        table = pq.read_table(tmp_path / "run" / "reference" / "confidence.parquet")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "reference").config.model_type == "gpt2"
        assert [name for name in table.column_names if name.startswith("nll")] == ["nll_2", "nll_5"]
        half = dict(zip(table[EXAMPLE_KEY].to_pylist(), table["half"].to_pylist(), strict=True))
        assert ours.halves.tolist() == [int(half[key] == "confident") for key in ours.example_keys]
        with pytest.raises(ValueError, match="has another vocabulary than the trained model"):
            train(tiny_model, tokenizer, token_rows, tmp_path / "tokens", **options)

    def test_a_finished_reference_is_used_again(
        self, tiny_model, tokenizer, chat_rows, finished, tmp_path, monkeypatch, caplog
    ):
        calls = kill_at(None, monkeypatch)
        again = train(tiny_model, tokenizer, chat_rows, tmp_path)
        assert (
            set(calls) == {SFTMixTrainer} and "reference/confidence.parquet. Remove its folder to train" in caplog.text
        )
        assert_same_weights(again, finished)
        with pytest.raises(InputError, match=r"was trained with `examples=.*`, but now it is .*Remove the folder"):
            train(tiny_model, tokenizer, chat_rows.map(change_question), tmp_path)

    def test_once_more_with_the_same_trainer(self, tiny_model, tokenizer, chat_rows, tmp_path, monkeypatch):
        """The reference has started where the trainer did, whose model is trained now."""
        trainer = train(tiny_model, tokenizer, chat_rows, tmp_path, max_steps=2)
        calls = kill_at(None, monkeypatch)
        trainer.train()
        assert set(calls) == {SFTMixTrainer}

    def test_equal_rows(self, tiny_model, tokenizer, chat_rows, tmp_path):
        """They share a key, but not a place in the data set."""
        rows = concatenate_datasets([chat_rows, chat_rows.select(range(4))])
        trainer = train(tiny_model, tokenizer, rows, tmp_path, max_steps=2)
        table = pq.read_table(tmp_path / "reference" / "confidence.parquet")
        assert trainer.halves.sum() == 8 and len(table) == 16 and len(set(table[EXAMPLE_KEY].to_pylist())) == 12

    def test_a_reference_of_other_settings_is_not_used(self, tiny_model, tokenizer, chat_rows, finished, tmp_path):
        """Neither by a new run nor by one that resumes between the phases."""
        arguments = (tiny_model, tokenizer, chat_rows, tmp_path)
        for step in (2, 4, 6):
            shutil.rmtree(tmp_path / f"checkpoint-{step}")
        settings = tmp_path / "reference" / "settings.json"
        assert str(tmp_path) not in settings.read_text()
        for resume in (None, True):
            with pytest.raises(InputError, match="was trained with `learning_rate.*Remove the folder to train"):
                train(*arguments, resume=resume, learning_rate=0.5)
        for content in ("{", "[1]"):
            settings.write_text(content)
            with pytest.raises(InputError, match="How the reference in .* was trained can't be read"):
                train(*arguments)

    def test_settings_that_are_compared(self, tiny_model, tokenizer, chat_rows, tmp_path):
        rows = chat_rows.shuffle(seed=0)
        adapter = partial(LoraConfig, r=4, target_modules=["q_proj", "v_proj"])
        other_model = copy.deepcopy(tiny_model)
        other_model.model.norm.weight.data[0] += 1
        other_tokenizer = copy.deepcopy(tokenizer)
        other_tokenizer.chat_template = f"Hello. {tokenizer.chat_template}"
        half = concatenate_datasets([rows.select(range(6)), rows.select(range(6, 12)).map(change_question)])

        def settings(model=tiny_model, processing=tokenizer, data=rows, **options):
            options = {"save_strategy": "no", **RUN, "peft_config": adapter(), **options}
            arguments = (model, processing, data, tmp_path)
            trainer = helpers.make_trainer(SFTMixTrainer, SFTMixConfig, *arguments, **options)
            phase = trainer._reference_phase
            start = describe_start(trainer, phase.arguments["model"])
            return describe_reference(trainer, phase.arguments, phase.peft_config, start)

        path = tmp_path / "settings.json"
        path.write_text(json.dumps(settings()))
        require_same_reference(path, settings(logging_steps=7, mixup_weight=0.5))
        for message, changed in (
            ("confidence_checkpoints=None`, but now it is [1]", {"confidence_checkpoints": [1]}),
            ("completion_only_loss=None`, but now it is False", {"completion_only_loss": False}),
            ("optim='adamw_torch_fused'`, but now it is 'sgd'", {"optim": "sgd"}),
            ("peft_config.lora_alpha=8`, but now it is 3", {"peft_config": adapter(lora_alpha=3)}),
            ("adapter=True`, but now it is False", {"peft_config": None}),
            ("chat_template=", {"processing": other_tokenizer}),
            ("examples='12 with the hash", {"data": half}),
            ("'`, but now it is '6 with", {"data": rows.select(range(6))}),
            ("model.version=", {"model": other_model}),
            ("batch_size=4`, but now it is 8", {"per_device_train_batch_size": 8}),
        ):
            with pytest.raises(InputError, match=f"was trained with `.*{re.escape(message)}"):
                require_same_reference(path, settings(**changed))

    def test_what_may_change(self, tiny_model, tokenizer, chat_rows, tmp_path, monkeypatch):
        """How a run is logged and saved, the second phase, the split of a batch, and where the start is."""
        tiny_model.save_pretrained(tmp_path / "start")
        tokenizer.save_pretrained(tmp_path / "start")
        options = {**SMALL, **RUN, "max_steps": 2, "save_strategy": "no", "max_length": 64}

        def run(folder, **changed):
            args = SFTMixConfig(str(tmp_path / "run"), **{**options, **changed})
            SFTMixTrainer(f"{tmp_path / folder}/", args, train_dataset=chat_rows).train()

        run("start")
        shutil.move(tmp_path / "start", tmp_path / "moved")
        calls = kill_at(None, monkeypatch)
        run(
            "moved", logging_steps=2, save_steps=5, mixup_weight=0.5, mixup_alpha=1.0, push_confidence=True,
            per_device_train_batch_size=2, gradient_accumulation_steps=2,
        )  # fmt: skip
        assert set(calls) == {SFTMixTrainer}

    def test_its_checkpoints_go_when_it_is_trained(self, tiny_model, tokenizer, chat_rows, finished, tmp_path):
        """So no optimizer's state is left behind."""
        assert (tmp_path / "checkpoint-6").is_dir() and (tmp_path / "reference" / "model.safetensors").is_file()
        assert not list((tmp_path / "reference").glob("checkpoint-*"))
        shutil.copytree(tmp_path / "checkpoint-6", tmp_path / "reference" / "checkpoint-6")  # it was killed before
        train(tiny_model, tokenizer, chat_rows, tmp_path, resume=True)
        assert not list((tmp_path / "reference").glob("checkpoint-*"))

    @pytest.mark.parametrize("packing", [False, True])
    def test_a_formatting_function_sees_the_rows_alone(self, packing, tiny_model, tokenizer, tmp_path):
        rows = Dataset.from_dict({"a": [f"What is {i}?" for i in range(8)], "b": ["The sum"] * 8})
        seen = []
        args = SFTMixConfig(str(tmp_path), **SMALL, max_length=64, max_steps=1, save_strategy="no", packing=packing)
        trainer = SFTMixTrainer(
            tiny_model, args, train_dataset=rows, processing_class=tokenizer,
            formatting_func=lambda row: seen.append(sorted(row)) or " ".join(row.values()),
        )  # fmt: skip
        num_before = len(seen)
        trainer.train()
        assert len(seen) > num_before and all(names == ["a", "b"] for names in seen)

    def test_best_model_by_nll(self, tiny_model, tokenizer, chat_rows, tmp_path):
        """The reference, a plain `SFTTrainer`, logs it as its loss."""
        best = {"load_best_model_at_end": True, "metric_for_best_model": "nll", "greater_is_better": False}
        evaluation = {"eval_dataset": chat_rows, "eval_strategy": "steps", "eval_steps": 2}
        trainer = train(tiny_model, tokenizer, chat_rows, tmp_path, **best, **evaluation)
        assert trainer.state.best_metric == min(
            log["eval_nll"] for log in trainer.state.log_history if "eval_nll" in log
        )

    def test_a_copied_start_has_a_forward_of_its_own(self, tiny_model, tokenizer, chat_rows, tmp_path):
        """The fused LM head's keeps the forward of the model it was put on."""
        trainer = helpers.make_trainer(SFTMixTrainer, SFTMixConfig, tiny_model, tokenizer, chat_rows, tmp_path)
        model = trainer._reference_phase._start(trainer)["model"]
        model.model.embed_tokens.weight.data.mul_(2)
        tokens = torch.tensor([[4, 5, 6]])
        assert not torch.equal(model(input_ids=tokens).logits, trainer.model(input_ids=tokens).logits)

    def test_the_reference_is_gone_when_mixup_begins(self, tiny_model, tokenizer, chat_rows, tmp_path, monkeypatch):
        alive, training_step = [], SFTTrainer.training_step

        def look(self, *args, **kwargs):
            if isinstance(self, ReferenceTrainer) and not alive:
                alive.extend([weakref.ref(self), weakref.ref(self.model)])
            elif type(self) is SFTMixTrainer:
                assert [reference() for reference in alive] == [None, None]
            return training_step(self, *args, **kwargs)

        monkeypatch.setattr(SFTTrainer, "training_step", look)
        train(tiny_model, tokenizer, chat_rows, tmp_path, save_strategy="no")

    def test_refusals(self, tiny_model, tokenizer, chat_rows, tmp_path, monkeypatch):
        with pytest.raises(InputError, match="`resume_from_checkpoint=True`, but `output_dir='.*'` has no checkpoint"):
            train(tiny_model, tokenizer, chat_rows, tmp_path, resume=True)
        make = partial(SFTMixTrainer, tiny_model, train_dataset=chat_rows, processing_class=tokenizer)
        args, optimizer = SFTMixConfig(str(tmp_path), **SMALL), torch.optim.SGD(tiny_model.parameters(), lr=0.1)
        with pytest.raises(InputError, match="`optimizers` are tied to the model to train"):
            make(args, optimizers=(optimizer, None))
        monkeypatch.setattr(SFTMixTrainer, "get_tp_size", lambda self: 2)
        with pytest.raises(InputError, match="which tensor parallelism does not allow"):
            make(args)


def as_text(row):
    return {"text": row["prompt"][0]["content"] + row["completion"][0]["content"] + "<|end|>"}


def change_question(row):
    return {"prompt": [{"role": "user", "content": row["prompt"][0]["content"] + "?"}]}


@pytest.fixture(scope="module")
def unbroken(tiny_model_factory, tokenizer, chat_rows, tmp_path_factory):
    """Runs that nobody stops, one of each kind."""
    folder = tmp_path_factory.mktemp("unbroken")
    return {
        kind: train(tiny_model_factory(), tokenizer, chat_rows, folder / kind, **options())
        for kind, options in KINDS.items()
    }


@pytest.fixture
def finished(unbroken, tmp_path):
    """A finished run, with its files in the test's own folder."""
    shutil.copytree(unbroken["full"].args.output_dir, tmp_path, dirs_exist_ok=True)
    return unbroken["full"]


class TestKilledAndResumed:
    """Each phase has six steps, with checkpoints after steps 2, 4 and 6."""

    @pytest.mark.parametrize(
        "kind, step, steps_left",
        [
            ("lora", 6, 8),
            ("lora", 7, 6),
            ("lora", 10, 4),
            ("packed", 4, 10),
            ("packed", 9, 4),
        ],
    )
    def test_same_weights(
        self, tiny_model, tokenizer, chat_rows, tmp_path, monkeypatch, unbroken, kind, step, steps_left
    ):
        arguments, options = (tiny_model, tokenizer, chat_rows, tmp_path), KINDS[kind]
        with monkeypatch.context() as patch:
            kill_at(step, patch)
            with pytest.raises(Killed):
                train(*arguments, **options())
        assert (tmp_path / "reference" / "confidence.parquet").exists() == (step > 6)
        calls = kill_at(None, monkeypatch)
        resumed = train(*arguments, resume=True, **options())
        assert len(calls) == steps_left
        assert torch.equal(resumed.halves, unbroken[kind].halves)
        assert_same_weights(resumed, unbroken[kind])

    @pytest.mark.parametrize("keeps_checkpoints", [False, True])
    def test_an_incomplete_checkpoint_is_passed_over(
        self, tiny_model, tokenizer, chat_rows, tmp_path, monkeypatch, unbroken, keeps_checkpoints
    ):
        """Without any the reference begins again."""
        options = {} if keeps_checkpoints else {"save_strategy": "no"}
        with monkeypatch.context() as patch:
            kill_at(6, patch)
            with pytest.raises(Killed):
                train(tiny_model, tokenizer, chat_rows, tmp_path, **options)
        if keeps_checkpoints:
            (tmp_path / "reference" / "checkpoint-4" / "trainer_state.json").unlink()
        calls = kill_at(None, monkeypatch)
        resumed = train(tiny_model, tokenizer, chat_rows, tmp_path, resume=True, **options)
        assert calls == (4 if keeps_checkpoints else 6) * [ReferenceTrainer] + 6 * [SFTMixTrainer]
        assert_same_weights(resumed, unbroken["full"])


class HalvesRecorder(TrainerCallback):
    """Keeps the halves of each step."""

    def __init__(self):
        self.halves = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.halves.append(self.trainer.halves)


class TestOnline:
    ONLINE = {"confidence_source": "online", "num_train_epochs": 3}

    def test_a_resumed_run_that_starts_over_forgets_the_failed_attempt(
        self, tiny_model, tokenizer, chat_rows, tmp_path
    ):
        """As `auto_find_batch_size` does after an error."""
        trainer, _ = self.run(tiny_model, tokenizer, chat_rows, tmp_path)
        checkpoint = sorted(tmp_path.glob("checkpoint-*"))[0]
        trainer._online.sums += 1
        trainer.begin_run(str(checkpoint))
        assert torch.equal(trainer._online.sums, torch.load(checkpoint / "sftmix_online.pt")["sums"])

    def run(self, model, tokenizer, rows, folder, resume=None, **options):
        recorder = HalvesRecorder()
        options = {"save_strategy": "steps", **RUN, **self.ONLINE, **options}
        trainer = helpers.make_trainer(
            SFTMixTrainer, SFTMixConfig, model, tokenizer, rows, folder, callbacks=[recorder], **options
        )
        recorder.trainer = trainer
        trainer.train(resume_from_checkpoint=resume)
        return trainer, recorder.halves

    def test_nothing_is_mixed_in_the_first_epoch(self, tiny_model, tokenizer, chat_rows, tmp_path):
        trainer, halves = self.run(tiny_model, tokenizer, chat_rows, tmp_path)
        assert not (tmp_path / "reference").exists()
        trainer.train()  # which knows nothing of what the run before it saw
        assert trainer._online.sums[2].tolist() == [3] * 12
        for run in (halves[:9], halves[9:]):
            assert [epoch.unique().tolist() for epoch in run] == 3 * [[-1]] + 6 * [[0, 1]]
            assert all(epoch.sum() == 6 for epoch in run[3:])
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert ["sftmix/mixup_loss" in log for log in logs] == 3 * [False] + 6 * [True]
        assert all(log["loss"] == pytest.approx(log["nll"], rel=1e-6) for log in logs[:3])

    @pytest.mark.parametrize("packing", [False, True])
    def test_halves_are_those_of_what_was_seen(self, tiny_model, tokenizer, token_rows, tmp_path, packing):
        """With a learning rate of zero it is the confidence of the start."""
        from test_sftmix_confidence import slow_nll

        options = {"learning_rate": 0.0, "save_strategy": "no", "packing": packing}
        trainer, halves = self.run(tiny_model, tokenizer, token_rows, tmp_path, **options)
        nll = np.array([slow_nll(tiny_model, row) for row in token_rows])
        assert halves[-1].tolist() == (np.argsort(np.argsort(nll)) < 8).astype(int).tolist()
        assert trainer._online.sums[1].numpy() / 3 == pytest.approx(nll, rel=1e-5)
        assert trainer._online.sums[0].numpy() / 3 == pytest.approx(np.exp(nll), rel=1e-4)
        assert trainer._online.sums[2].tolist() == [3] * 16

    def test_resume(self, tiny_model, tokenizer, token_rows, tmp_path):
        options = {"save_steps": 1}
        unbroken, halves = self.run(tiny_model, tokenizer, token_rows, tmp_path, **options)
        assert not torch.equal(halves[4], halves[8])
        for step in (2, 4, 6, 9):
            shutil.copytree(tmp_path / f"checkpoint-{step}", tmp_path / "resumed" / f"checkpoint-{step}")
            resumed, resumed_halves = self.run(
                tiny_model, tokenizer, token_rows, tmp_path / "resumed", resume=True, **options, save_strategy="no"
            )
            shutil.rmtree(tmp_path / "resumed")
            assert all(torch.equal(a, b) for a, b in zip(halves[step:], resumed_halves, strict=True))
            assert_same_weights(unbroken, resumed)

    def test_refusals(self, tiny_model, tokenizer, chat_rows, tmp_path):
        with pytest.raises(InputError, match="the run of 3 steps ends in the first"):
            self.run(tiny_model, tokenizer, chat_rows, tmp_path, max_steps=3)
        other = {"confidence_split": "random", "max_steps": 2}
        self.run(tiny_model, tokenizer, chat_rows, tmp_path, **other)
        with pytest.raises(InputError, match="`confidence_split` was 'random', is now 'confidence'"):
            self.run(tiny_model, tokenizer, chat_rows, tmp_path, resume=str(tmp_path / "checkpoint-2"))
        self.run(tiny_model, tokenizer, chat_rows, tmp_path)
        options = {"resume": True, "ignore_data_skip": True}
        with pytest.raises(InputError, match="was made with 12 training examples, but there are 10"):
            self.run(tiny_model, tokenizer, chat_rows.select(range(10)), tmp_path, **options)
        state = tmp_path / "checkpoint-9" / "sftmix_online.pt"
        torch.save({"other": 1}, tmp_path / "other.pt")
        for content in (state.read_bytes()[:200], b"", pickle.dumps(print), (tmp_path / "other.pt").read_bytes()):
            state.write_bytes(content)
            with pytest.raises(InputError, match=r"sftmix_online.pt can't be read .*\. Resume from another"):
                self.run(tiny_model, tokenizer, chat_rows, tmp_path, resume=True)
        state.unlink()
        with pytest.raises(InputError, match=r"sftmix_online.pt can't be read \(FileNotFoundError.*Resume"):
            self.run(tiny_model, tokenizer, chat_rows, tmp_path, resume=True)
        tiny_model.model.norm.weight.data[0] = math.nan
        with pytest.raises(
            InputError, match="The perplexity of example 0 of the prepared train dataset is NaN, and 12"
        ):
            self.run(tiny_model, tokenizer, chat_rows, tmp_path)
