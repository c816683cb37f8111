import itertools
import math

import pytest
import torch
from datasets import Dataset
from helpers import assert_same_gradients, make_trainer, one_step, padded_document_log_probs
from peft import LoraConfig, PromptTuningConfig, TaskType
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from hf_sft_variants import SFTGOConfig, SFTGOTrainer
from hf_sft_variants.errors import InputError
from hf_sft_variants.sft_go.tfidf import TokenTfidf


LAYOUTS = {
    "padded": {},
    "packed": {"packing": True},
    "packed_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 20},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding_free": {"padding_free": True, "max_length": None},
    "padded_to_multiple": {"pad_to_multiple_of": 8},
    "padding_free_to_multiple": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
    "truncated": {"max_length": 11},
}


@pytest.fixture(scope="module")
def grouped_rows(token_rows):
    """The pre-tokenized rows with own group ids: four groups, some tokens in none."""
    groups = [
        [(7 * position + row) % 5 - 1 for position in range(len(ids))]
        for row, ids in enumerate(token_rows["input_ids"])
    ]
    return token_rows.add_column("mine", groups)


@pytest.fixture
def moe_model(tokenizer):
    set_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=32, head_dim=16,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
            max_position_embeddings=128, router_aux_loss_coef=0.5, output_router_logits=True, pad_token_id=0,
            eos_token_id=2, bos_token_id=None,
        )
    )  # fmt: skip


class TestLimitCaseIsSFTTrainer:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_loss_and_every_gradient_to_the_last_bit(self, layout, tiny_model, tokenizer, token_rows, tmp_path):
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **LAYOUTS[layout]}
        common = (tiny_model, tokenizer, token_rows, tmp_path)
        loss, gradients = one_step(SFTTrainer, SFTConfig, *common, **options)
        our_loss, our_gradients = one_step(SFTGOTrainer, SFTGOConfig, *common, worst_group_weight=0, **options)
        assert our_loss == loss
        assert_same_gradients(our_gradients, gradients)

    def test_mixture_of_experts_with_accumulation(self, moe_model, tokenizer, token_rows, tmp_path):
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
        common = (moe_model, tokenizer, token_rows, tmp_path)
        loss, gradients = one_step(SFTTrainer, SFTConfig, *common, **options)
        our_loss, our_gradients = one_step(SFTGOTrainer, SFTGOConfig, *common, worst_group_weight=0, **options)
        no_aux, _ = one_step(SFTTrainer, SFTConfig, *common, router_aux_loss_coef=0.0, **options)
        assert our_loss == loss != no_aux
        assert_same_gradients(our_gradients, gradients)

    @pytest.mark.parametrize(
        "peft_config",
        [
            LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules="all-linear"),
            PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
        ],
        ids=["lora", "prompt_tuning"],
    )
    def test_peft(self, peft_config, tiny_model, tokenizer, token_rows, tmp_path):
        options = {"per_device_train_batch_size": 4, "peft_config": peft_config}
        common = (tiny_model, tokenizer, token_rows, tmp_path)
        loss, gradients = one_step(SFTTrainer, SFTConfig, *common, **options)
        our_loss, our_gradients = one_step(SFTGOTrainer, SFTGOConfig, *common, worst_group_weight=0, **options)
        assert our_loss == loss
        assert_same_gradients(our_gradients, gradients)

    def test_evaluation(self, tiny_model, tokenizer, token_rows, tmp_path):
        options = {"eval_dataset": token_rows, "per_device_eval_batch_size": 4}
        common = (tiny_model, tokenizer, token_rows, tmp_path)
        plain = make_trainer(SFTTrainer, SFTConfig, *common, **options).evaluate()
        ours = make_trainer(SFTGOTrainer, SFTGOConfig, *common, worst_group_weight=0, **options).evaluate()
        assert ours["eval_loss"] == plain["eval_loss"]
        log_probs = [padded_document_log_probs(tiny_model, row["input_ids"], row["labels"]) for row in token_rows]
        nll = [-log_prob for row in log_probs for log_prob in row if log_prob is not None]
        assert ours["eval_nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)  # of tokens, not of batches

    def test_evaluation_of_a_mixture_of_experts(self, moe_model, tokenizer, token_rows, tmp_path):
        common = (moe_model, tokenizer, token_rows, tmp_path)
        options = {"eval_dataset": token_rows}
        plain = make_trainer(SFTTrainer, SFTConfig, *common, **options).evaluate()
        ours = make_trainer(SFTGOTrainer, SFTGOConfig, *common, worst_group_weight=0, **options).evaluate()
        assert ours["eval_loss"] == plain["eval_loss"]


class TestSplitsOfABatch:
    """The same global batch gives the same loss and gradients however it is cut."""

    @pytest.mark.parametrize("sample_weighting", ["tokens", "uniform"])
    @pytest.mark.parametrize("groups", [{"group_by": "tfidf"}, {"group_by": "column", "group_column": "mine"}])
    def test_every_split(self, groups, sample_weighting, tiny_model, tokenizer, grouped_rows, tmp_path):
        rows = grouped_rows.select(range(8))
        options = {"sample_weighting": sample_weighting, **groups}
        common = (SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, rows, tmp_path)
        loss, gradients = one_step(*common, per_device_train_batch_size=8, **options)
        splits = [
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
            {"per_device_train_batch_size": 3, "packing": True},
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "packing": True},
            {
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "padding_free": True,
                "max_length": None,
            },
        ]
        for split in splits:
            split_loss, split_gradients = one_step(*common, **options, **split)
            assert split_loss == pytest.approx(loss, rel=1e-6), split
            assert_same_gradients(split_gradients, gradients, tolerance=1e-6)

    def test_metrics_of_every_split(self, tiny_model, tokenizer, token_rows, tmp_path):
        logs = []
        for batch_size, steps in ((8, 1), (2, 4), (1, 8)):
            trainer = make_trainer(
                SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, token_rows.select(range(8)), tmp_path,
                max_steps=1, per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps,
            )  # fmt: skip
            trainer.train()
            logs.append({name: value for name, value in trainer.state.log_history[0].items() if "nll" in name})
        assert len(logs[0]) == 3
        assert logs[1] == pytest.approx(logs[0]) and logs[2] == pytest.approx(logs[0])

    def test_packed_rows_are_few(self, tiny_model, tokenizer, token_rows, tmp_path):
        trainer = make_trainer(
            SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, token_rows.select(range(8)), tmp_path, packing=True
        )
        assert len(trainer.train_dataset) == 3

    def test_micro_batch_scope_depends_on_the_split(self, tiny_model, tokenizer, grouped_rows, tmp_path):
        options = {"group_by": "column", "group_column": "mine", "group_scope": "micro_batch"}
        common = (SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, grouped_rows.select(range(8)), tmp_path)
        whole, _ = one_step(*common, per_device_train_batch_size=8, **options)
        halves, _ = one_step(*common, per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
        assert whole < halves  # a maximum of means is at most the mean of maxima


class TestLossFromTheModelsLogits:
    """The logged loss against the formula on log-probabilities from the model's own logits."""

    @pytest.mark.parametrize("layout", [{}, {"packing": True}], ids=["padded", "packed"])
    @pytest.mark.parametrize("scope", ["sample", "micro_batch"])
    @pytest.mark.parametrize("weighting", ["tokens", "uniform"])
    @pytest.mark.parametrize("weight", [0.9, 1.0])
    def test_value(self, layout, scope, weighting, weight, tiny_model, tokenizer, grouped_rows, tmp_path):
        rows = grouped_rows.select(range(6))
        loss, _ = one_step(
            SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, rows, tmp_path,
            group_by="column", group_column="mine", group_scope=scope, sample_weighting=weighting,
            worst_group_weight=weight, per_device_train_batch_size=6, **layout,
        )  # fmt: skip
        assert loss == pytest.approx(self.expected(tiny_model, rows, scope, weighting, weight), rel=1e-5)

    @staticmethod
    def expected(model, rows, scope, weighting, weight):
        samples = []
        for row in rows:
            log_probs = padded_document_log_probs(model, row["input_ids"], row["labels"])
            tokens = [(-lp, group) for lp, group in zip(log_probs, row["mine"][1:], strict=True) if lp is not None]
            share = 1 / len(tokens) if weighting == "uniform" else 1.0
            samples.append([(nll, group, share) for nll, group in tokens])
        scopes = [list(itertools.chain(*samples))] if scope == "micro_batch" else samples
        numerator = denominator = 0.0
        for tokens in scopes:
            total = sum(share for *_, share in tokens)
            means = [
                sum(nll * share for nll, g, share in tokens if g == group)
                / sum(share for _, g, share in tokens if g == group)
                for group in {g for _, g, _ in tokens} - {-1}
            ]
            mean = sum(nll * share for nll, _, share in tokens) / total
            numerator += total * ((1 - weight) * mean + weight * max(means, default=mean))
            denominator += total
        return numerator / denominator


class TestGroups:
    def test_tfidf_marks_the_asked_share_of_the_labels(self, tiny_model, tokenizer, chat_rows, tmp_path):
        trainer = make_trainer(
            SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, chat_rows, tmp_path, important_fraction=0.3
        )
        for row in trainer.train_dataset:
            supervised = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
            groups = [row["group_ids"][t] for t in supervised]
            assert groups.count(1) == round(0.3 * len(supervised)) and groups.count(-1) == 0
            end_of_turn = [t for t in supervised if row["labels"][t] == tokenizer.eos_token_id]
            assert [row["group_ids"][t] for t in end_of_turn] == [1]
            assert all(row["group_ids"][t] == -1 for t in range(len(row["labels"])) if t not in supervised)

    def test_groups_are_made_after_truncation(self, tiny_model, tokenizer, token_rows, tmp_path):
        for layout in ({}, {"packing": True}):
            trainer = make_trainer(
                SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, token_rows, tmp_path,
                max_length=14, min_grouped_tokens=0, **layout,
            )  # fmt: skip
            for batch in trainer.get_train_dataloader():
                groups = batch["group_ids"][:, 1:][batch["labels"][:, 1:] != -100]
                assert groups.min() == 0 and groups.max() == 1

    def test_own_scores(self, tiny_model, tokenizer, token_rows, tmp_path):
        rows = token_rows.add_column("mine", [[float(t) for t in range(len(ids))] for ids in token_rows["input_ids"]])
        trainer = make_trainer(
            SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, rows, tmp_path,
            group_by="column", importance_column="mine", special_tokens_important=False, max_length=20,
        )  # fmt: skip
        first = trainer.train_dataset[0]
        assert len(first["input_ids"]) == len(first["group_ids"]) == 20
        supervised = [t for t, label in enumerate(first["labels"]) if t > 0 and label != -100]
        num_important = round(0.5 * len(supervised))
        assert [t for t in supervised if first["group_ids"][t] == 1] == supervised[-num_important:]

    def test_own_columns_are_cut_from_the_same_end(self, tiny_model, tokenizer, grouped_rows, tmp_path):
        with pytest.warns(FutureWarning, match="keep_end"):
            trainer = make_trainer(
                SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, grouped_rows, tmp_path,
                group_by="column", group_column="mine", truncation_mode="keep_end", max_length=9,
            )  # fmt: skip
        assert trainer.train_dataset[0]["group_ids"] == grouped_rows[0]["mine"][-9:]

    def test_evaluation_uses_the_training_sets_frequencies(self, tiny_model, tokenizer, chat_rows, tmp_path):
        trainer = make_trainer(
            SFTGOTrainer,
            SFTGOConfig,
            tiny_model,
            tokenizer,
            chat_rows,
            tmp_path,
            eval_dataset=chat_rows.select([3, 4]),
        )
        assert trainer.eval_dataset[0]["importance_scores"] == trainer.train_dataset[3]["importance_scores"]
        assert "eval_sft_go/important_nll" in trainer.evaluate(chat_rows.select([0]).to_iterable_dataset())

    def test_streaming_with_a_fitted_file(self, tiny_model, tokenizer, chat_rows, tmp_path):
        options = {"tfidf_file": str(tmp_path / "idf.npz"), "max_steps": 2}
        common = (SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer)
        fitted = make_trainer(*common, chat_rows, tmp_path, **options)
        streamed = make_trainer(*common, chat_rows.to_iterable_dataset(), tmp_path, **options)
        assert [row["group_ids"] for row in streamed.train_dataset] == list(fitted.train_dataset["group_ids"])
        streamed.train()
        assert streamed.state.global_step == 2


class TestStreams:
    """The defaults, with document frequencies of the first five of twelve rows."""

    options = {
        "min_grouped_tokens": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-2,
        "max_steps": 3,
    }

    @pytest.fixture(autouse=True)
    def fitted_on_five(self, monkeypatch):
        monkeypatch.setattr("hf_sft_variants.sft_go.tfidf.STREAM_ROWS", 5)

    def make(self, model, tokenizer, rows, folder, **options):
        options = {**self.options, **options}
        return make_trainer(
            SFTGOTrainer, SFTGOConfig, model, tokenizer, rows.to_iterable_dataset(), folder, **options
        )  # fmt: skip

    def assert_same_weights(self, first, second):
        for (name, weights), other in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
            assert torch.equal(weights, other), name

    def test_equals_a_file_fitted_on_the_same_rows(self, tiny_model, tokenizer, chat_rows, tmp_path):
        file = str(tmp_path / "idf.npz")
        make_trainer(SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, chat_rows.select(range(5)), tmp_path / "fit",
                     tfidf_file=file)  # fmt: skip
        evaluation = {"eval_dataset": chat_rows.select(range(5, 9)).to_iterable_dataset()}
        fitted = self.make(tiny_model, tokenizer, chat_rows, tmp_path / "a", **evaluation)
        with_file = self.make(tiny_model, tokenizer, chat_rows, tmp_path / "b", tfidf_file=file, **evaluation)
        for name in ("train_dataset", "eval_dataset"):
            first, second = ([row["group_ids"] for row in getattr(of, name)] for of in (fitted, with_file))
            assert first == second and {1, 0} <= set(first[0])
        fitted.train(), with_file.train()
        assert fitted.state.global_step == 3
        self.assert_same_weights(fitted, with_file)

    def test_resume(self, tiny_model, tokenizer, chat_rows, tmp_path):
        unbroken = self.make(tiny_model, tokenizer, chat_rows, tmp_path)
        unbroken.train()
        resumed = self.make(tiny_model, tokenizer, chat_rows, tmp_path)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        self.assert_same_weights(resumed, unbroken)
        # What comes later may be other rows, but not what the frequencies are of
        rest = chat_rows.select([0, 1, 2, 3, 4, 11, 10, 9, 8, 7, 6, 5])
        trainer = self.make(tiny_model, tokenizer, rest, tmp_path)
        assert trainer.checkpoint_to_resume(str(tmp_path / "checkpoint-1"))
        other = self.make(tiny_model, tokenizer, chat_rows.select(range(1, 12)), tmp_path)
        message = r"`document_frequencies` was '\w{16} \(of the start of the stream\)', is '\w{16} \(of the start"
        with pytest.raises(InputError, match=message):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


class TestPreparedSets:
    """A training set that comes annotated and packed."""

    def test_document_frequencies_are_of_the_training_set(self, tiny_model, tokenizer, chat_rows, tmp_path):
        common = (SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer)
        options = {"packing": True, "completion_only_loss": True}
        rows, held_out = chat_rows.select(range(8)), chat_rows.select(range(8, 12))
        first = make_trainer(*common, rows, tmp_path, eval_dataset=held_out, **options)
        file = tmp_path / "idf.npz"
        second = make_trainer(
            *common, first.train_dataset, tmp_path, eval_dataset=held_out, tfidf_file=str(file), **options
        )
        expected = TokenTfidf.fit(make_trainer(*common, rows, tmp_path).train_dataset, tokenizer)
        assert second._tfidf.digest() == TokenTfidf.load(file, tokenizer).digest() == expected.digest()
        assert second.eval_dataset[:] == first.eval_dataset[:]

    def test_resume_with_other_rows(self, tiny_model, tokenizer, chat_rows, tmp_path):
        common = (SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer)
        options = {"packing": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        first = make_trainer(*common, chat_rows.select(range(8)), tmp_path, **options)
        first.train()
        prepared = make_trainer(*common, first.train_dataset, tmp_path, **options)
        prepared.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))  # prepared here or before
        assert prepared.state.global_step == 2
        others = make_trainer(*common, chat_rows.select(range(4, 12)), tmp_path, **options).train_dataset
        trainer = make_trainer(*common, others, tmp_path, **options)
        with pytest.raises(InputError, match="was made with .* training examples, and the .* of this run are others"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


class TestSchedulesAndMetrics:
    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [
            ("constant", [0.8, 0.8, 0.8, 0.8]),
            ("linear", [0.8, 0.65, 0.5, 0.35]),
            ("cosine", [0.2 + 0.6 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]),
        ],
    )
    def test_weight_moves_over_the_run(self, schedule, expected, tiny_model, tokenizer, token_rows, tmp_path):
        trainer = make_trainer(
            SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, token_rows, tmp_path, max_steps=4, save_strategy="no",
            worst_group_weight=0.8, worst_group_weight_end=0.2, worst_group_schedule=schedule,
        )  # fmt: skip
        trainer.train()
        logged = [log["sft_go/worst_group_weight"] for log in trainer.state.log_history if "loss" in log]
        assert logged == pytest.approx(expected)

    def test_metrics_of_two_groups(self, tiny_model, tokenizer, token_rows, tmp_path):
        """With every token in a group, the loss follows from the logged group means of one sample."""
        trainer = make_trainer(
            SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, token_rows.select([0]), tmp_path, max_steps=1
        )
        trainer.train()
        log = trainer.state.log_history[0]
        worst = max(log["sft_go/important_nll"], log["sft_go/unimportant_nll"])
        assert log["loss"] == pytest.approx(0.1 * log["nll"] + 0.9 * worst, rel=1e-5)
        assert log["sft_go/important_is_worst"] == (log["sft_go/important_nll"] == worst)
        assert {"entropy", "mean_token_accuracy", "num_tokens"} <= log.keys()

    def test_metrics_of_own_groups(self, tiny_model, tokenizer, token_rows, tmp_path):
        rows = token_rows.filter(lambda row: len(row["input_ids"]) > 7)
        groups = [[row % 2 * (t % 3) for t in range(len(ids))] for row, ids in enumerate(rows["input_ids"])]
        trainer = make_trainer(
            SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, rows.add_column("mine", groups), tmp_path,
            max_steps=1, group_by="column", group_column="mine", per_device_train_batch_size=16,
        )  # fmt: skip
        trainer.train()
        log = trainer.state.log_history[0]
        # Half of the rows have all three groups, the other half one: only the former have a worst group
        assert sum(log[f"sft_go/group_{group}_is_worst"] for group in range(3)) == pytest.approx(1)
        assert "sft_go/group_3_nll" not in log and "sft_go/group_3_is_worst" not in log

    def test_nothing_to_learn_in_a_micro_batch(self, tiny_model, tokenizer, tmp_path):
        rows = Dataset.from_dict({"input_ids": [[3, 4, 5], [6, 7, 8]], "labels": [[-100] * 3, [6, 7, 8]]})
        options = {"max_length": None, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        common = (SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer)
        loss, gradients = one_step(*common, rows, tmp_path, **options)
        alone, gradients_alone = one_step(*common, rows.select([1]), tmp_path, **options)
        assert loss == pytest.approx(alone)
        assert_same_gradients(gradients, gradients_alone, tolerance=1e-6)

    def test_evaluation_does_not_follow_the_schedule(self, tiny_model, tokenizer, token_rows, tmp_path):
        trainer = make_trainer(
            SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, token_rows, tmp_path, max_steps=3, learning_rate=0.0,
            worst_group_schedule="linear", eval_dataset=token_rows, eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        trainer.train()
        assert len({log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}) == 1

    def test_short_samples_have_cross_entropy(self, tiny_model, tokenizer, token_rows, tmp_path, caplog):
        common = (tiny_model, tokenizer, token_rows, tmp_path)
        loss, _ = one_step(SFTTrainer, SFTConfig, *common)
        assert one_step(SFTGOTrainer, SFTGOConfig, *common, min_grouped_tokens=40)[0] == pytest.approx(loss)
        assert "No token of the train dataset is in a group" in caplog.text
        assert one_step(SFTGOTrainer, SFTGOConfig, *common, min_grouped_tokens=2)[0] > loss

    def test_wrapped_packing_warns(self, tiny_model, tokenizer, token_rows, tmp_path, caplog):
        options = {"packing": True, "packing_strategy": "wrapped"}
        make_trainer(SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, token_rows, tmp_path, **options)
        assert "each packed row counts as one sample" in caplog.text

    def test_groups_stand_on_their_tokens_under_prompt_tuning(self, tiny_model, tokenizer, grouped_rows, tmp_path):
        """Virtual tokens are prepended: the loss and the groups' means must be those of the real tokens."""
        row = grouped_rows.select([0])
        peft_config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
        options = {"group_by": "column", "group_column": "mine", "max_steps": 1, "peft_config": peft_config}
        trainer = make_trainer(SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, row, tmp_path, **options)
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor(row["input_ids"][:])).logits[0]
        trainer.train()
        log_probs = logits[-len(row[0]["labels"]) - 1 : -1].log_softmax(-1)
        labels, groups = row[0]["labels"], row[0]["mine"]
        for group in range(4):
            nll = [
                -log_probs[t, label] for t, label in enumerate(labels) if t and label != -100 and groups[t] == group
            ]
            assert trainer.state.log_history[0][f"sft_go/group_{group}_nll"] == pytest.approx(
                float(sum(nll)) / len(nll)
            )

    def test_own_groups_without_preparation(self, tiny_model, tokenizer, grouped_rows, tmp_path):
        rows = grouped_rows.rename_column("mine", "group_ids")
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "group_by": "column", "group_column": "group_ids"}
        loss, _ = one_step(SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, rows, tmp_path, **options)
        prepared = {"group_by": "column", "group_column": "mine"}
        assert (
            loss == one_step(SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, grouped_rows, tmp_path, **prepared)[0]
        )


class TestBadInput:
    def trainer(self, tiny_model, tokenizer, rows, tmp_path, **options):
        return make_trainer(SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, rows, tmp_path, **options)

    def test_scores_of_another_length(self, tiny_model, tokenizer, token_rows, tmp_path):
        scores = [[0.5] * len(ids) for ids in token_rows["input_ids"]]
        scores[5].append(0.5)
        rows = token_rows.add_column("mine", scores)
        for layout in ({}, {"packing": True}, {"max_length": None}, {"max_length": 6}):
            with pytest.raises(ValueError, match=r"Row 5 of the train dataset: column `mine` has 9 values, but .* 8"):
                self.trainer(
                    tiny_model, tokenizer, rows, tmp_path, group_by="column", importance_column="mine", **layout
                )

    def test_missing_column(self, tiny_model, tokenizer, token_rows, tmp_path):
        with pytest.raises(ValueError, match="The train dataset has no column `mine`; it has"):
            self.trainer(tiny_model, tokenizer, token_rows, tmp_path, group_by="column", group_column="mine")

    def test_column_that_is_no_list(self, tiny_model, tokenizer, token_rows, tmp_path):
        rows = token_rows.add_column("mine", [1] * len(token_rows))
        with pytest.raises(ValueError, match="Row 0 of the train dataset: column `mine` has 1, but"):
            self.trainer(tiny_model, tokenizer, rows, tmp_path, group_by="column", group_column="mine")

    def test_group_ids_that_are_no_integers(self, tiny_model, tokenizer, token_rows, tmp_path):
        rows = token_rows.add_column("mine", [[0.5] * len(ids) for ids in token_rows["input_ids"]])
        with pytest.raises(ValueError, match=r"column `mine` has 0.5 as a group id"):
            self.trainer(tiny_model, tokenizer, rows, tmp_path, group_by="column", group_column="mine")

    @pytest.mark.parametrize("data_format", ["numpy", "torch", "pandas"])
    def test_formatted_data_is_no_bad_input(self, data_format, tiny_model, tokenizer, grouped_rows, tmp_path):
        rows = grouped_rows.with_format(data_format)
        options = {"group_by": "column", "group_column": "mine"}
        trainer = self.trainer(tiny_model, tokenizer, rows, tmp_path, **options)
        assert trainer.train_dataset[0]["group_ids"] == grouped_rows[0]["mine"]

    def test_own_column_without_truncation(self, tiny_model, tokenizer, grouped_rows, tmp_path):
        options = {"group_by": "column", "group_column": "mine", "truncation_mode": "keep_end", "max_length": None}
        with pytest.warns(FutureWarning, match="keep_end"):
            trainer = self.trainer(tiny_model, tokenizer, grouped_rows, tmp_path, **options)
        assert trainer.train_dataset[0]["group_ids"] == grouped_rows[0]["mine"]

    def test_counts_that_are_not_known(self, tiny_model, tokenizer, token_rows, tmp_path):
        trainer = self.trainer(tiny_model, tokenizer, token_rows, tmp_path, sample_weighting="uniform")
        batch = next(iter(trainer.get_train_dataloader()))
        with pytest.raises(KeyError, match="The number of `samples` in the optimizer step is not known"):
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(100))
        # Without a count the micro-batch counts for itself, and the batch can be used again
        assert trainer.compute_loss(trainer.model, batch) == trainer.compute_loss(trainer.model, batch)

    def test_no_supervised_token(self, tiny_model, tokenizer, token_rows, tmp_path):
        rows = token_rows.map(lambda row: {"labels": [row["labels"][0]] + [-100] * (len(row["labels"]) - 1)})
        for layout in ({}, {"packing": True}, {"max_length": None}):
            with pytest.raises(ValueError, match="The train dataset has no supervised token"):
                self.trainer(tiny_model, tokenizer, rows, tmp_path, **layout)
