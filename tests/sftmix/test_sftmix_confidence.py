"""Confidence: what the callback measures, the file, and the split that follows from it."""

import json
import math
from functools import partial

import helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import padded_document_log_probs
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_sft_variants import ConfidenceTrackingCallback, SFTMixConfig, SFTMixTrainer
from hf_sft_variants.base.example_keys import EXAMPLE_KEY, add_content_keys
from hf_sft_variants.errors import InputError
from hf_sft_variants.scoring.shards import write_parquet
from hf_sft_variants.sftmix.confidence import checkpoint_steps
from hf_sft_variants.sftmix.confidence_file import (
    MAX_NLL,
    confidence_table,
    halves_from_file,
)
from hf_sft_variants.sftmix.pairing import CONFIDENT, NEITHER, UNCONFIDENT, split_in_halves
from hf_sft_variants.sftmix.trainer import _number_example


make_plain = partial(helpers.make_trainer, SFTTrainer, SFTConfig)
make_sftmix = partial(helpers.make_trainer, SFTMixTrainer, SFTMixConfig)


def track(trainer, path, **options):
    trainer.add_callback(ConfidenceTrackingCallback(trainer, path, **options))
    return trainer


def tracked_run(model, tokenizer, rows, folder, resume=None, **options):
    """A plain run that saves after each step it is evaluated at, and its confidence file."""
    options = {"num_train_epochs": 3, "learning_rate": 1e-2, "save_strategy": "epoch", **options}
    tracking = {name: options.pop(name) for name in ("checkpoints", "measure", "dataset") if name in options}
    trainer = track(make_plain(model, tokenizer, rows, folder, **options), folder / "confidence.parquet", **tracking)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, pq.read_table(folder / "confidence.parquet")


def slow_nll(model, row):
    values = [
        value for value in padded_document_log_probs(model, row["input_ids"], row["labels"]) if value is not None
    ]
    return -sum(values) / len(values) if values else math.nan


class TestCallback:
    @pytest.mark.parametrize("packing", [False, True])
    def test_equals_a_slow_computation(self, tiny_model, tokenizer, token_rows, tmp_path, packing):
        options = {"per_device_train_batch_size": 4, "packing": packing, "per_device_eval_batch_size": 2}
        trainer, table = tracked_run(tiny_model, tokenizer, token_rows, tmp_path, **options)
        steps = [trainer.state.max_steps * epoch // 3 for epoch in (1, 2, 3)]
        examples = trainer.train_dataset
        keyed = add_content_keys(token_rows)
        rows = dict(zip(keyed[EXAMPLE_KEY], token_rows, strict=True))
        assert set(table[EXAMPLE_KEY].to_pylist()) == set(rows) and (packing or len(examples) == len(rows))
        expected = {}
        for step in steps:
            model = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}").eval()
            nll = [slow_nll(model, rows[key]) for key in table[EXAMPLE_KEY].to_pylist()]
            assert table[f"nll_{step}"].to_pylist() == pytest.approx(nll, rel=1e-5)
            assert table[f"perplexity_{step}"].to_pylist() == pytest.approx(np.exp(nll), rel=1e-4)
            expected[step] = nll
        mean = np.mean([np.exp(nll) for nll in expected.values()], axis=0)
        assert table["mean_perplexity"].to_pylist() == pytest.approx(mean, rel=1e-4)
        assert table["mean_nll"].to_pylist() == pytest.approx(np.mean(list(expected.values()), axis=0), rel=1e-5)
        assert table["rank"].to_pylist() == np.argsort(np.argsort(mean)).tolist()
        assert table["half"].to_pylist() == [
            "confident" if rank < 8 else "unconfident" for rank in table["rank"].to_pylist()
        ]
        described = json.loads(table.schema.metadata[b"hf_sft_variants"])
        assert described == {"version": 2, "measure": "perplexity", "steps": steps, "keys": "tokens"}

    def test_the_run_goes_on_as_if_it_had_not_been_there(self, tiny_model, tokenizer, token_rows, tmp_path):
        weights = []
        for name in ("plain", "tracked"):
            peft_config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3)
            trainer = make_plain(
                tiny_model, tokenizer, token_rows, tmp_path / name, peft_config=peft_config, learning_rate=1e-2,
                per_device_train_batch_size=4, num_train_epochs=2, save_strategy="no",
            )  # fmt: skip
            if name == "tracked":
                modes = ModeRecorder()
                track(trainer, tmp_path / "confidence.parquet", checkpoints=range(1, 9)).add_callback(modes)
            trainer.train()
            weights.append(trainer.model.state_dict())
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert modes.seen == [True] * 8

    def test_a_resumed_run_writes_the_same_file(self, tiny_model, tokenizer, token_rows, tmp_path):
        options = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
        options["checkpoints"] = [1, 3, 5, 8]
        _, unbroken = tracked_run(tiny_model, tokenizer, token_rows, tmp_path, **options)
        (tmp_path / "confidence.parquet").unlink()
        parts = tmp_path / "confidence.parquet.checkpoints"
        kept = {step: (parts / f"step-{step}.parquet").stat().st_mtime_ns for step in (1, 3)}
        pq.write_table(pa.table({"nll": [0.0]}), parts / "step-5.parquet")  # of the steps that were lost
        _, resumed = tracked_run(
            tiny_model, tokenizer, token_rows, tmp_path, resume=str(tmp_path / "checkpoint-3"), **options
        )
        assert resumed.equals(unbroken)
        assert kept == {step: (parts / f"step-{step}.parquet").stat().st_mtime_ns for step in (1, 3)}
        options["resume"] = str(tmp_path / "checkpoint-6")
        with pytest.raises(InputError, match="The examples in .*step-1.parquet differ from those"):
            tracked_run(tiny_model, tokenizer, token_rows.select(range(15, -1, -1)), tmp_path, **options)
        (parts / "step-1.parquet").unlink()
        with pytest.raises(InputError, match="resumed at step 6, but .*step-1.parquet is missing"):
            tracked_run(tiny_model, tokenizer, token_rows, tmp_path, **options)

    def test_prompt_learning_predicts_the_first_token_too(self, tiny_model, tokenizer, token_rows, tmp_path):
        rows = token_rows.map(lambda row: {"labels": row["input_ids"]})
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        trainer, table = tracked_run(
            tiny_model, tokenizer, rows, tmp_path, peft_config=prompt, max_steps=1, checkpoints=[1], save_strategy="no"
        )
        model = trainer.model.eval()
        for row, nll in zip(rows, table["nll_1"].to_pylist(), strict=True):
            ids = torch.tensor([row["input_ids"]])
            assert nll == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)

    def test_data_that_is_looked_at_as_tensors(self, tiny_model, tokenizer, token_rows, tmp_path):
        options = {"max_steps": 2, "save_strategy": "no"}
        _, table = tracked_run(tiny_model, tokenizer, token_rows, tmp_path, **options)
        _, of_tensors = tracked_run(tiny_model, tokenizer, token_rows.with_format("torch"), tmp_path, **options)
        assert table.equals(of_tensors)

    def test_an_early_stop_keeps_what_was_measured(self, tiny_model, tokenizer, token_rows, tmp_path, caplog):
        for stop, steps in ((5, [4]), (3, [])):
            trainer = make_plain(
                tiny_model, tokenizer, token_rows, tmp_path, per_device_train_batch_size=4, num_train_epochs=3,
                save_strategy="no", callbacks=[StopAt(stop)],
            )  # fmt: skip
            track(trainer, tmp_path / f"{stop}.parquet").train()
            assert (tmp_path / f"{stop}.parquet").exists() == bool(steps)
        assert pq.read_schema(tmp_path / "5.parquet").names[2:4] == ["nll_4", "perplexity_4"]
        assert "Training ended before its first checkpoint" in caplog.text

    def test_nan_names_the_example(self, tiny_model, tokenizer, token_rows, tmp_path):
        tiny_model.model.embed_tokens.weight.data[token_rows[3]["input_ids"][0]] = math.nan
        options = {"per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 0.0}
        key = add_content_keys(token_rows)[EXAMPLE_KEY][0]
        with pytest.raises(InputError, match=rf"The perplexity of row 0 of the train dataset \(key {key}\) is NaN"):
            tracked_run(tiny_model, tokenizer, token_rows, tmp_path, **options)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"packing": True, "packing_strategy": "wrapped"}, "`packing_strategy='wrapped'` cuts examples"),
            ({"packing": True, "packing_strategy": "bfd_split"}, "`packing_strategy='bfd_split'` cuts examples"),
            ({"stream": True}, "is a stream, so its examples can't be ranked"),
            ({"checkpoints": [3, 9]}, r"\[3, 9\] must be steps of the run, from 1 to 4"),
            ({"measure": "loss"}, "`measure='loss'` is unknown"),
        ],
    )
    def test_refusals(self, tiny_model, tokenizer, token_rows, tmp_path, options, message):
        options = {"max_steps": 4, **options}
        rows = token_rows.to_iterable_dataset() if options.pop("stream", False) else token_rows
        with pytest.raises(InputError, match=message):
            tracked_run(tiny_model, tokenizer, rows, tmp_path, **options)

    @pytest.mark.parametrize(
        "arguments, steps",
        [
            ((None, 12, 4), [4, 8, 12]),
            ((None, 13, 4), [4, 8, 12, 13]),
            ((None, 11, 4), [4, 7, 11]),
            ((None, 30, None), [10, 20, 30]),
            ((None, 1, 1), [1]),
            ((None, 2, 4), [1, 2]),
            (([7, 2, 7], 9, 3), [2, 7]),
        ],
    )
    def test_steps(self, arguments, steps):
        assert checkpoint_steps(*arguments) == steps


class ModeRecorder(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(all(module.training for module in model.modules()))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class TestSplit:
    @pytest.mark.parametrize("size", [2, 3, 10, 11])
    def test_halves_differ_by_at_most_one(self, size):
        nll = np.random.default_rng(size).random(size)
        halves = split_in_halves(np.exp(nll), nll, "perplexity").tolist()
        assert halves.count(CONFIDENT) == halves.count(UNCONFIDENT) == size // 2
        assert max(nll[np.array(halves) == CONFIDENT]) < min(nll[np.array(halves) == UNCONFIDENT])

    def test_ties(self):
        perplexity, nll = np.array([2.0, 1, 1, 1, 1, 1, 1, 0]), np.array([5.0, 3, 1, 2, 2, 2, 9, 9])
        #  by perplexity: 7; then by nll: 2 (1); 3, 4, 5 (2, by number); 1 (3); 6 (9); then 0
        assert split_in_halves(perplexity, nll, "perplexity").tolist() == [0, 0, 1, 1, 1, 0, 0, 1]
        assert split_in_halves(perplexity, nll, "mean_nll").tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
        assert split_in_halves(np.ones(4), np.ones(4), "perplexity").tolist() == [1, 1, 0, 0]

    def test_examples_without_a_label_are_in_neither_half(self):
        nll = np.array([3.0, math.nan, 1.0])
        assert split_in_halves(nll, nll, "perplexity").tolist() == [UNCONFIDENT, NEITHER, CONFIDENT]

    def test_table(self):
        nll = {2: np.array([1.0, 30.0, math.nan, 2.0]), 4: np.array([3.0, 1.0, math.nan, 2.0])}
        table = confidence_table(["a", "b", "c", "d"], np.array([1, 2, 0, 3]), nll, "perplexity", "text")
        assert table["perplexity_2"].to_pylist() == [math.exp(1), math.exp(MAX_NLL), None, math.exp(2)]
        assert table["mean_nll"].to_pylist() == [2.0, 15.5, None, 2.0]
        assert table["mean_perplexity"][0].as_py() == pytest.approx((math.exp(1) + math.exp(3)) / 2)
        assert table["rank"].to_pylist() == [1, 2, None, 0]
        assert table["half"].to_pylist() == [None, "unconfident", None, "confident"]
        by_nll = confidence_table(["a", "b", "c", "d"], np.array([1, 2, 0, 3]), nll, "mean_nll", "text")
        assert by_nll["rank"].to_pylist() == [0, 2, None, 1]


class TestKeys:
    @pytest.mark.parametrize("kind", ["text", "prompt", "conversations", "formatted", "chat", "tokens"])
    @pytest.mark.parametrize("packing", [False, True])
    def test_file_of_a_plain_run(self, tiny_model, tokenizer, chat_rows, token_rows, tmp_path, kind, packing):
        """What `SFTTrainer` makes of the rows is found again by `SFTMixTrainer`."""
        texts = [f"{row['prompt'][0]['content']} {row['completion'][0]['content']}" for row in chat_rows]
        texts[5] = texts[2]
        rows = {
            "text": [{"text": text + "<|im_end|>" * (i % 2)} for i, text in enumerate(texts)],
            "prompt": [{"prompt": text[:9], "completion": text[9:]} for text in texts],
            "conversations": [
                {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]} for text in texts
            ],
            "formatted": [{"first": text, "second": text[::-1]} for text in texts],
            "chat": chat_rows.to_list(),
            "tokens": token_rows.to_list(),
        }[kind]
        options = {"formatting_func": join_columns} if kind == "formatted" else {}
        rows = Dataset.from_list(rows)
        options.update(max_length=30, packing=packing, max_steps=2, save_strategy="no")
        path = str(tmp_path / "confidence.parquet")
        track(make_plain(tiny_model, tokenizer, rows, tmp_path, **options), path).train()
        options.update(confidence_source="file", confidence_file=path)
        ours = make_sftmix(tiny_model, tokenizer, rows, tmp_path, **options)
        halves = ours.halves.tolist()
        assert halves.count(CONFIDENT) == halves.count(UNCONFIDENT) == len(rows) // 2

    def test_own_keys_are_unique(self, tiny_model, tokenizer, token_rows, tmp_path):
        rows = token_rows.add_column(EXAMPLE_KEY, [*map(str, range(15)), "3"])
        message = "Column `example_key` names two examples the same. Give each a key of its own"
        with pytest.raises(InputError, match=message):
            make_sftmix(tiny_model, tokenizer, rows, tmp_path)
        trainer = make_plain(tiny_model, tokenizer, rows, tmp_path, remove_unused_columns=True)
        with pytest.raises(InputError, match=message):
            track(trainer, tmp_path / "confidence.parquet").train()


def join_columns(row):
    return row["first"] + row["second"]


@pytest.fixture
def examples(token_rows):
    """Four numbered examples; the last has no label."""
    rows = [*token_rows.select(range(3)).to_list(), {"input_ids": [5, 6], "labels": [5, -100]}]
    dataset = add_content_keys(Dataset.from_list(rows))
    return dataset.map(_number_example, with_indices=True, fn_kwargs={"is_train": True})


class TestFile:
    def write(self, path, keys, nll):
        table = confidence_table(keys, np.ones(len(keys), int), {1: np.array(nll)}, "perplexity", "column")
        write_parquet(table, path)
        return path

    def test_is_joined_by_key(self, examples, tmp_path):
        keys = examples[EXAMPLE_KEY]
        path = self.write(tmp_path / "c.parquet", [keys[2], "other", keys[0], keys[1]], [1.0, 0.5, 2.0, 3.0])
        assert halves_from_file(path, examples, "perplexity").tolist() == [NEITHER, UNCONFIDENT, CONFIDENT, NEITHER]

    def test_missing_examples(self, examples, tmp_path):
        keys = examples[EXAMPLE_KEY]
        path = self.write(tmp_path / "c.parquet", [keys[2], keys[0]], [1.0, 2.0])
        with pytest.raises(
            InputError, match=rf"Row 1 of the train dataset \(key {keys[1]}\) is not in .*, and 1 of 3"
        ):
            halves_from_file(path, examples, "perplexity")
        assert halves_from_file(path, examples, "perplexity", skip_missing=True).tolist() == [0, -1, 1, -1]
        path = self.write(tmp_path / "c.parquet", ["a", "b"], [1.0, 2.0])
        with pytest.raises(InputError, match="is that of another data set: none of the 3 examples"):
            halves_from_file(path, examples, "perplexity", skip_missing=True)

    def test_an_example_twice(self, examples, tmp_path):
        """Equal rows share a key: they may be in the file again, up to rounding, and need one row there."""
        keys = examples[EXAMPLE_KEY]
        path = self.write(tmp_path / "c.parquet", [*keys[:3], keys[1]], [1.0, 2.0, 3.0, 2.00001])
        assert halves_from_file(path, examples, "perplexity").tolist() == [CONFIDENT, NEITHER, UNCONFIDENT, NEITHER]
        rows = concatenate_datasets([examples.select(range(3)), examples.select([0])])
        assert halves_from_file(path, rows, "perplexity").tolist() == [CONFIDENT, UNCONFIDENT, UNCONFIDENT, CONFIDENT]
