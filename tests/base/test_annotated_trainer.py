import inspect
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import SMALL, assert_same_gradients, make_trainer, one_step
from transformers import DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments
from trl import DPOConfig, SFTConfig, SFTTrainer

from hf_sft_variants import AnnotatedSFTTrainer, SFTGOConfig, SFTGOTrainer
from hf_sft_variants.base.validation import refuse_sequence_sharding
from hf_sft_variants.errors import InputError
from hf_sft_variants.evaluation.generation import evaluation_mode


def echo_tokens(example):
    return {"echo": example["input_ids"], "thirds": [token_id / 3 for token_id in example["input_ids"]]}


class EchoTrainer(AnnotatedSFTTrainer):
    """Annotates each token with its own id, so that any shift, cut or mix-up shows."""

    annotation_columns = {"echo": -7, "thirds": 0.0}

    def annotate(self, dataset, dataset_name):
        return dataset.map(echo_tokens)

    def compute_annotated_loss(self, batch):
        labels_echoed = batch.annotations["echo"][batch.label_mask]
        batch.metrics["echo/token_sum"] = (labels_echoed.sum(), 1)
        torch.testing.assert_close(batch.annotations["thirds"][batch.label_mask], labels_echoed / 3)
        return super().compute_annotated_loss(batch)


def as_arrays(rows):
    yield from rows.with_format("numpy")


STREAMS = {
    "tensors": lambda rows: rows.to_iterable_dataset().with_format("torch"),
    "generator": lambda rows: IterableDataset.from_generator(as_arrays, gen_kwargs={"rows": rows}),
}

LAYOUTS = {
    "padded": {},
    "truncated": {"max_length": 11},
    "not_truncated": {"max_length": None},
    "bfd": {"packing": True},
    "bfd_truncating": {"packing": True, "max_length": 11},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 11},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 40},
    "wrapped_padding_free": {"packing": True, "packing_strategy": "wrapped", "max_length": 40, "padding_free": True},
    "padding_free": {"padding_free": True, "max_length": None},
    "multiple_of_16": {"pad_to_multiple_of": 16},
    "padding_free_multiple_of_16": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
    "shuffled": {"shuffle_dataset": True},
    "shuffled_and_packed": {"shuffle_dataset": True, "packing": True, "max_length": 11},
    "two_workers": {"dataset_num_proc": 2},
}


def assert_annotations_stand_on_their_tokens(batch):
    is_padding = batch["echo"] == -7
    assert torch.equal(batch["echo"][~is_padding], batch["input_ids"][~is_padding])
    assert (batch["labels"][is_padding] == -100).all() and (batch["thirds"][is_padding] == 0).all()
    if "attention_mask" in batch:
        assert torch.equal(is_padding, batch["attention_mask"] == 0)


class TestAnnotationsFollowTokens:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streaming"])
    def test_through_every_layout(self, layout, streaming, tiny_model, tokenizer, token_rows, tmp_path):
        rows = token_rows.to_iterable_dataset() if streaming else token_rows
        options = {"max_steps": 2, "per_device_train_batch_size": 3, **LAYOUTS[layout]}
        common = (tiny_model, tokenizer, rows, tmp_path)
        ours = make_trainer(EchoTrainer, SFTConfig, *common, **options)
        plain = make_trainer(SFTTrainer, SFTConfig, *common, **options)
        our_batches, plain_batches = list(ours.get_train_dataloader()), list(plain.get_train_dataloader())
        assert len(our_batches) == len(plain_batches) > 1
        for our_batch, plain_batch in zip(our_batches, plain_batches, strict=True):
            assert_annotations_stand_on_their_tokens(our_batch)
            assert plain_batch.keys() <= our_batch.keys()
            for key, value in plain_batch.items():
                assert torch.equal(torch.as_tensor(our_batch[key]), torch.as_tensor(value)), key

    @pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
    def test_streams_of_arrays(self, stream, tiny_model, tokenizer, token_rows, tmp_path):
        common, options = (EchoTrainer, SFTConfig, tiny_model, tokenizer), {"max_length": 11, "max_steps": 2}
        ours, lists = (
            make_trainer(*common, rows, tmp_path, **options).train_dataset for rows in (stream(token_rows), token_rows)
        )
        assert list(ours) == list(lists)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_training_equals_sft_trainer(self, layout, tiny_model, tokenizer, token_rows, tmp_path):
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **LAYOUTS[layout]}
        common = (tiny_model, tokenizer, token_rows, tmp_path)
        loss, gradients = one_step(SFTTrainer, SFTConfig, *common, **options)
        our_loss, our_gradients = one_step(EchoTrainer, SFTConfig, *common, **options)
        assert our_loss == pytest.approx(loss, rel=1e-6)
        assert_same_gradients(our_gradients, gradients, tolerance=1e-6)

    @pytest.mark.parametrize(
        "rows",
        [
            Dataset.from_dict({"text": ["What is 12 plus 30?", "The sum is 42.", "cows"]}),
            Dataset.from_dict({"prompt": ["What is 12 plus 30? ", "7 + 5 = "], "completion": ["42", "12"]}),
            Dataset.from_list(
                [{"messages": [{"role": "user", "content": "7?"}, {"role": "assistant", "content": "8"}]}]
            ),
            Dataset.from_list([{"conversations": [{"from": "human", "value": "7?"}, {"from": "gpt", "value": "8"}]}]),
            Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]]}),
            Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]], "completion_mask": [[0, 1, 1], [0, 1]]}),
        ],
        ids=["text", "prompt_completion", "messages", "from_value", "pre_tokenized", "pre_tokenized_mask"],
    )
    def test_kinds_of_data(self, rows, tiny_model, tokenizer, tmp_path):
        trainer = make_trainer(EchoTrainer, SFTConfig, tiny_model, tokenizer, rows, tmp_path, eval_dataset=rows)
        for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
            for batch in loader:
                assert_annotations_stand_on_their_tokens(batch)

    def test_several_evaluation_sets_and_a_late_one(self, tiny_model, tokenizer, token_rows, chat_rows, tmp_path):
        trainer = make_trainer(
            EchoTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path,
            eval_dataset={"short": token_rows.select([1, 3]), "long": token_rows.select([0, 8])}, packing=True,
            eval_packing=False,
        )  # fmt: skip
        metrics = trainer.evaluate()
        for name, indices in (("short", [1, 3]), ("long", [0, 8])):
            labels = [label for row in indices for label in token_rows[row]["labels"][1:] if label != -100]
            assert metrics[f"eval_{name}_echo/token_sum"] == sum(labels)
        assert "eval_echo/token_sum" in trainer.evaluate(chat_rows)
        assert "eval_new_nll" in trainer.evaluate({"new": chat_rows.to_iterable_dataset()})
        for prefix in ("test", "eval_late"):
            logged = trainer.evaluate(chat_rows, metric_key_prefix=prefix)
            found = {name for name in logged if name.endswith(("nll", "token_sum"))}
            assert found == {f"{prefix}_nll", f"{prefix}_echo/token_sum"}

    def test_skipped_preparation_needs_the_columns(self, tiny_model, tokenizer, token_rows, tmp_path):
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_steps": 1, "save_strategy": "no"}
        trainer = make_trainer(EchoTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path, **options)
        with pytest.raises(InputError, match="The data set has no column `echo`"):
            trainer.train()
        rows = token_rows.map(echo_tokens)
        make_trainer(EchoTrainer, SFTConfig, tiny_model, tokenizer, rows, tmp_path, **options).train()

    def test_annotation_of_another_length(self, tiny_model, tokenizer, token_rows, tmp_path):
        class ShortTrainer(EchoTrainer):
            def annotate(self, dataset, dataset_name):
                return dataset.map(lambda example: {"echo": example["input_ids"][1:], "thirds": [0.0]})

        trainer = make_trainer(ShortTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path)
        with pytest.raises(ValueError, match=r"Column `echo` has \d+ values in an example of \d+ tokens"):
            trainer.train()

    def test_streamed_numbers_are_not_cut_to_integers(self, tiny_model, tokenizer, token_rows, tmp_path):
        class HalfTrainer(AnnotatedSFTTrainer):
            annotation_columns = {"half": 0.0}

            def annotate(self, dataset, dataset_name):
                return dataset.map(lambda row, i: {"half": [0.5 if i else 1] * len(row["labels"])}, with_indices=True)

        rows = token_rows.to_iterable_dataset()
        trainer = make_trainer(HalfTrainer, SFTConfig, tiny_model, tokenizer, rows, tmp_path, max_steps=1)
        assert {1.0, 0.5} <= set(next(iter(trainer.get_train_dataloader()))["half"].flatten().tolist())

    def test_fractions_in_an_integer_column(self, tiny_model, tokenizer, token_rows, tmp_path):
        class HalfTrainer(AnnotatedSFTTrainer):
            annotation_columns = {"half": 0}

            def annotate(self, dataset, dataset_name):
                return dataset.map(lambda row: {"half": [0.5] * len(row["labels"])})

        trainer = make_trainer(HalfTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path)
        with pytest.raises(ValueError, match="Column `half` has fractions, but its padding value is an integer"):
            next(iter(trainer.get_train_dataloader()))

    def test_deepspeed_does_not_round_annotations(self, tiny_model, tokenizer, token_rows, tmp_path, monkeypatch):
        trainer = make_trainer(EchoTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path)
        batch = next(iter(trainer.get_train_dataloader()))
        to_bfloat16 = {key: value.bfloat16() for key, value in batch.items() if key == "thirds"}
        monkeypatch.setattr(SFTTrainer, "_prepare_inputs", lambda self, inputs: {**inputs, **to_bfloat16})
        assert torch.equal(trainer._prepare_inputs(batch)["thirds"], batch["thirds"])

    def test_masks_without_labels_are_refused_late_too(self, tiny_model, tokenizer, token_rows, tmp_path):
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}}
        rows = token_rows.map(echo_tokens)
        trainer = make_trainer(EchoTrainer, SFTConfig, tiny_model, tokenizer, rows, tmp_path, **options)
        masked = rows.remove_columns("labels").add_column("completion_mask", rows["labels"][:])
        with pytest.raises(ValueError, match="mask columns but no 'labels'"):
            trainer.evaluate(masked)


class TestCountsAndScaling:
    def test_counting_nothing_else(self, tiny_model, tokenizer, token_rows, tmp_path):
        class PlainTrainer(AnnotatedSFTTrainer):
            def count_items(self, inputs):
                return {}

        make_trainer(PlainTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path, max_steps=1).train()

    def test_counts_are_of_the_whole_step(self, tiny_model, tokenizer, token_rows, tmp_path):
        seen = []

        class CountingTrainer(AnnotatedSFTTrainer):
            def compute_annotated_loss(self, batch):
                seen.append({name: int(count) for name, count in batch.num_items.items()})
                return super().compute_annotated_loss(batch)

        rows = token_rows.select(range(4)).add_column("unused", list("abcd"))
        options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1}
        trainer = make_trainer(CountingTrainer, SFTConfig, tiny_model, tokenizer, rows, tmp_path, **options)
        trainer.train()
        num_tokens = sum(label != -100 for labels in rows["labels"] for label in labels[1:])
        assert seen == [{"samples": 4, "tokens": num_tokens}] * 4

        seen.clear()
        trainer.evaluate(rows.select([1]))  # no count is given: the micro-batch's own
        assert seen == [{"samples": 1, "tokens": 2}]

    def test_a_count_may_be_a_fraction(self, tiny_model, tokenizer, token_rows, tmp_path):
        class WeightedMeanTrainer(AnnotatedSFTTrainer):
            def count_items(self, inputs):
                return {"weights": 1e-3 * (inputs["labels"][:, 1:] != -100).sum()}

            def compute_annotated_loss(self, batch):
                return -1e-3 * batch.log_probs.sum() / batch.num_items["weights"]

        common = (tiny_model, tokenizer, token_rows, tmp_path)
        weighted, plain = (
            one_step(trainer_class, SFTConfig, *common)[0]
            for trainer_class in (WeightedMeanTrainer, AnnotatedSFTTrainer)
        )
        assert weighted == pytest.approx(plain, rel=1e-6)

    def test_samples_without_a_label_are_not_counted(self, tiny_model, tokenizer, tmp_path):
        rows = Dataset.from_dict({"input_ids": [[3, 4, 5], [6, 7], [8, 9]], "labels": [[-100] * 3, [6, -100], [8, 9]]})
        for layout in ({"max_length": None}, {"packing": True}):
            trainer = make_trainer(AnnotatedSFTTrainer, SFTConfig, tiny_model, tokenizer, rows, tmp_path, **layout)
            (batch,) = trainer.get_train_dataloader()
            assert trainer.count_items(batch)["samples"] == 1

    def test_nothing_to_learn_is_a_differentiable_zero(self, tiny_model, tokenizer, token_rows, tmp_path):
        trainer = make_trainer(EchoTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path)
        batch = next(iter(trainer.get_train_dataloader()))
        batch["labels"] = torch.full_like(batch["labels"], -100)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        assert loss.item() == 0
        assert all((parameter.grad == 0).all() for parameter in trainer.model.parameters())


class TestWhatStaysTRLs:
    def test_arguments_are_sft_trainers(self):
        ours = list(inspect.signature(AnnotatedSFTTrainer.__init__).parameters)
        assert ours == list(inspect.signature(SFTTrainer.__init__).parameters)
        ours = inspect.signature(AnnotatedSFTTrainer.compute_loss)
        assert ours == inspect.signature(SFTTrainer.compute_loss)

    def test_metrics(self, tiny_model, tokenizer, token_rows, tmp_path):
        options = {"max_steps": 2, "eval_dataset": token_rows, "save_strategy": "no"}
        trainers = [
            make_trainer(trainer_class, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path, **options)
            for trainer_class in (SFTTrainer, AnnotatedSFTTrainer)
        ]
        for trainer in trainers:
            trainer.train(), trainer.evaluate()
        for plain, ours in zip(*[trainer.state.log_history for trainer in trainers], strict=True):
            kept = {key: value for key, value in plain.items() if "runtime" not in key and "per_second" not in key}
            assert {key: ours[key] for key in kept} == pytest.approx(kept, rel=1e-6, abs=0)
            if "loss" in plain:
                assert ours["nll"] == pytest.approx(plain["loss"], rel=1e-4)

    def test_a_failed_attempt_is_not_logged(self, tiny_model, tokenizer, token_rows, tmp_path):
        """`auto_find_batch_size` begins anew with 3 rows, after one batch of 4 that fits and one that does not."""

        class FullTrainer(AnnotatedSFTTrainer):
            def compute_annotated_loss(self, batch):
                if batch.num_samples == 4 and self.state.global_step == 1:
                    raise RuntimeError("CUDA out of memory.")
                return super().compute_annotated_loss(batch)

        common = {"max_steps": 2, "logging_steps": 2, "save_strategy": "no"}
        logs = []
        for trainer_class, options in (
            (FullTrainer, {"per_device_train_batch_size": 4, "auto_find_batch_size": True}),
            (AnnotatedSFTTrainer, {"per_device_train_batch_size": 3}),
        ):
            trainer = make_trainer(
                trainer_class, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path,
                train_sampling_strategy="sequential", learning_rate=0.0, **common, **options,
            )  # fmt: skip
            trainer.train()
            logs.append(trainer.state.log_history[0])
        assert [logs[0][name] for name in ("nll", "entropy")] == [logs[1][name] for name in ("nll", "entropy")]

    def test_predictions_are_not_logged(self, tiny_model, tokenizer, token_rows, tmp_path):
        """Neither before training nor in the midst of a step, which ends with a log."""

        class Predicting(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                self.trainer.predict(token_rows.select([0]))

        class LoggingFirst(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                with evaluation_mode(self.trainer.model):
                    self.trainer.log({"of_a_callback": 1.0})

        logs = []
        for callbacks in ([], [Predicting(), LoggingFirst()]):
            trainer = make_trainer(
                AnnotatedSFTTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path, callbacks=callbacks,
                max_steps=2, save_strategy="no", prediction_loss_only=True, eval_dataset=token_rows,
            )  # fmt: skip
            for callback in callbacks:
                callback.trainer = trainer
                trainer.predict(token_rows.select([0]))
            trainer.train()
            logs.append([log for log in trainer.state.log_history if "train_runtime" not in log])
        expected, (first, *found) = logs
        assert set(first) == {"of_a_callback", "epoch", "step"}
        assert [log["nll"] for log in found] == [log["nll"] for log in expected]
        expected = {name: value for name, value in trainer.evaluate().items() if "entropy" in name or "nll" in name}
        trainer.predict(token_rows.select([0]))
        again = trainer.evaluate()
        assert len(expected) == 2 and {name: again[name] for name in expected} == expected

    @pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
    def test_outputs_are_returned(self, tiny_model, tokenizer, token_rows, tmp_path):
        trainer = make_trainer(EchoTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path)
        batch = next(iter(trainer.get_train_dataloader()))
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        assert loss.ndim == 0 and outputs.logits.shape[:2] == batch["input_ids"].shape

    def test_own_collator(self, tiny_model, tokenizer, token_rows, tmp_path):
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        def left_padding(examples):
            batch = DataCollatorForLanguageModeling(pad_token_id=0)(examples)
            return {key: value.flip(1) for key, value in batch.items()}

        for collator, works in (
            (DataCollatorForLanguageModeling(pad_token_id=0), True),
            (DataCollatorForSeq2Seq(tokenizer), True),  # pads all that it is given
            (left_padding, False),
        ):
            args = SFTConfig(str(tmp_path), **SMALL)
            trainer = EchoTrainer(
                tiny_model, args, data_collator=collator, train_dataset=token_rows, processing_class=tokenizer
            )
            loader = iter(trainer.get_train_dataloader())
            if works:
                assert_annotations_stand_on_their_tokens(next(loader))
            else:
                with pytest.raises(ValueError, match="`data_collator` moves, drops or changes tokens"):
                    next(loader)

    @pytest.mark.parametrize("layout", [{}, {"packing": True}], ids=["padded", "packed"])
    def test_second_start_reads_the_prepared_data(self, layout, tiny_model, tokenizer, token_rows, tmp_path):
        token_rows.save_to_disk(tmp_path / "data")
        common = (EchoTrainer, SFTConfig, tiny_model, tokenizer)
        prepared = [
            make_trainer(*common, Dataset.load_from_disk(tmp_path / "data"), tmp_path, **layout).train_dataset
            for _ in range(2)
        ]
        assert prepared[0]._fingerprint == prepared[1]._fingerprint


class TestConfiguration:
    def test_without_arguments(self, tiny_model, tokenizer, token_rows, tmp_path, monkeypatch):
        @dataclass
        class CPUConfig(SFTGOConfig):
            use_cpu: bool = True

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(SFTGOTrainer, "config_class", CPUConfig)
        trainer = SFTGOTrainer(tiny_model, train_dataset=token_rows, processing_class=tokenizer)
        assert type(trainer.args) is CPUConfig and trainer.args.output_dir.endswith("-SFT-GO")

    @pytest.mark.parametrize("args_class", [SFTConfig, TrainingArguments])
    def test_plainer_arguments_are_kept(self, args_class, tiny_model, tokenizer, token_rows, tmp_path):
        options = {**SMALL, "learning_rate": 0.123, "hub_token": "secret", "seed": 7, "eval_strategy": "steps",
                   "eval_steps": 3, "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 3}  # fmt: skip
        args = args_class(str(tmp_path), **options)
        trainer = SFTGOTrainer(
            tiny_model, args, train_dataset=token_rows, eval_dataset=token_rows, processing_class=tokenizer
        )
        assert type(trainer.args) is SFTGOConfig
        for name in (*options, "output_dir", "accelerator_config"):
            if name != "gradient_checkpointing":
                assert getattr(trainer.args, name) == getattr(args, name), name

    def test_another_trainers_arguments(self, tiny_model, tokenizer, token_rows, tmp_path):
        args = DPOConfig(str(tmp_path), **SMALL)
        with pytest.raises(InputError, match="`args` must be an `SFTGOConfig` or an `SFTConfig` .* got `DPOConfig`"):
            SFTGOTrainer(tiny_model, args, train_dataset=token_rows, processing_class=tokenizer)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"loss_type": "dft"}, "`loss_type='dft'` is not supported: EchoTrainer has its own loss"),
            ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor=0.1` is not supported"),
            ({"eval_packing": True}, "`eval_packing=True` without `packing=True` is not supported"),
            ({"packing": True, "max_length": None}, "`max_length` can't be `None`"),
            ({"truncation_mode": "middle"}, "Unsupported truncation mode: middle"),
        ],
    )
    def test_refusals(self, options, message, tiny_model, tokenizer, token_rows, tmp_path):
        with pytest.raises(ValueError, match=message):
            make_trainer(EchoTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path, **options)

    @pytest.mark.parametrize("name", ["cp", "sp"])
    def test_sequence_sharding(self, name):
        config = SimpleNamespace(cp_enabled=name == "cp", sp_enabled=name == "sp", cp_size=2, sp_size=2)
        with pytest.raises(ValueError, match=f"EchoTrainer does not support `{name}_size=2`"):
            refuse_sequence_sharding("EchoTrainer", SimpleNamespace(parallelism_config=config))

    def test_own_loss_function(self, tiny_model, token_rows, tmp_path):
        args = SFTConfig(str(tmp_path), **SMALL)
        with pytest.raises(ValueError, match="`compute_loss_func` is not supported"):
            EchoTrainer(tiny_model, args, train_dataset=token_rows, compute_loss_func=lambda *_: 0)

    def test_vision_data(self, tiny_model, tokenizer, tmp_path):
        args = SFTConfig(str(tmp_path), **SMALL)
        rows = Dataset.from_dict({"images": [[None]], "text": ["hello"]})
        for dataset in (rows, rows.to_iterable_dataset()):
            with pytest.raises(ValueError, match="has the column 'images': vision data sets are not supported"):
                EchoTrainer(tiny_model, args, train_dataset=dataset, processing_class=tokenizer)

    def test_empty_data(self, tiny_model, tokenizer, token_rows, tmp_path):
        with pytest.raises(ValueError, match="`train_dataset` is empty"):
            make_trainer(EchoTrainer, SFTConfig, tiny_model, tokenizer, token_rows.select([]), tmp_path)

    def test_no_supervised_token_in_an_evaluation_set(self, tiny_model, tokenizer, token_rows, tmp_path):
        masked = token_rows.map(lambda row: {"labels": [-100] * len(row["labels"])})
        with pytest.raises(ValueError, match="The eval dataset has no supervised token"):
            make_trainer(EchoTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path, eval_dataset=masked)

    def test_tokens_without_an_embedding_in_any_set(self, tiny_model, tokenizer, token_rows, tmp_path):
        tiny_model.resize_token_embeddings(100)
        known = token_rows.map(lambda row: {"input_ids": [token_id % 100 for token_id in row["input_ids"]]})
        for rows, eval_dataset, name in (
            (token_rows, None, "train"),
            (token_rows, {"train": known}, "train"),  # must not hide the training set
            (known, token_rows, "eval"),
            (known, {"new": known, "late": token_rows}, "late"),
        ):
            with pytest.raises(InputError, match=rf"The {name} dataset has the token id 29\d, but the model has 100 "):
                make_trainer(EchoTrainer, SFTConfig, tiny_model, tokenizer, rows, tmp_path, eval_dataset=eval_dataset)
        make_trainer(EchoTrainer, SFTConfig, tiny_model, tokenizer, known, tmp_path, eval_dataset={"train": known})

    def test_packed_data_is_not_packed_again(self, tiny_model, tokenizer, token_rows, tmp_path):
        options = {"packing": True, "max_length": 40, "eval_dataset": token_rows}
        trainer = make_trainer(EchoTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path, **options)
        assert trainer.evaluate()["eval_loss"] == trainer.evaluate(trainer.eval_dataset)["eval_loss"]
        packed = trainer.train_dataset
        again = make_trainer(EchoTrainer, SFTConfig, tiny_model, tokenizer, packed, tmp_path, **options)
        assert again.train_dataset["seq_lengths"] == packed["seq_lengths"]

    def test_dropped_examples_are_counted(self, tiny_model, tokenizer, token_rows, tmp_path, caplog):
        rows = token_rows.map(lambda row: {"labels": ([-100] * 5 + row["labels"][5:])[: len(row["labels"])]})
        trainer = make_trainer(EchoTrainer, SFTConfig, tiny_model, tokenizer, rows, tmp_path, max_length=10)
        assert len(trainer.train_dataset) == 13
        assert "Dropped 3 of 16 examples of the train dataset" in caplog.text


def test_the_description_of_the_run_is_in_the_checkpoint_of_a_trial(tiny_model, tokenizer, token_rows, tmp_path):
    options = {"max_steps": 1, "save_steps": 1}
    trainer = make_trainer(AnnotatedSFTTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path, **options)
    trainer._get_output_dir = lambda trial: str(tmp_path / "run-0")  # as a hyperparameter search does
    trainer.train()
    assert (tmp_path / "run-0" / "checkpoint-1" / "hf_sft_variants.json").is_file()
    assert not (tmp_path / "checkpoint-1").exists()


def test_example_in_the_docstring(tiny_model, tokenizer, token_rows, tmp_path):
    """The example is what users copy: it runs as it stands, on another model and data."""
    (code,) = re.findall(r"```python\n(.*?)```", inspect.getdoc(AnnotatedSFTTrainer), re.DOTALL)
    assert len(code.splitlines()) <= 30
    definitions = code[: code.index("trainer =")]
    namespace = {}
    exec(definitions, namespace)
    trainer = make_trainer(
        namespace["LateTokensTrainer"], SFTConfig, tiny_model, tokenizer, token_rows, tmp_path, max_steps=2
    )
    trainer.train()
    assert 0 < trainer.state.log_history[0]["late_tokens/mean_weight"] < 1
