import itertools
import math
from functools import partial

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
def make(tiny_model, tokenizer, tmp_path):
    """Makes an SFTGOTrainer of rows and options."""
    return partial(make_trainer, SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, output_dir=tmp_path)


@pytest.fixture
def step(tiny_model, tokenizer, tmp_path):
    """Loss and gradients of an optimizer step of an SFTGOTrainer of rows and options."""
    return partial(one_step, SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, output_dir=tmp_path)


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
    @pytest.fixture(params=["dense", "mixture_of_experts"])
    def model(self, request, tiny_model):
        return tiny_model if request.param == "dense" else request.getfixturevalue("moe_model")

    def check_step(self, *common, **options):
        loss, gradients = one_step(SFTTrainer, SFTConfig, *common, **options)
        our_loss, our_gradients = one_step(SFTGOTrainer, SFTGOConfig, *common, worst_group_weight=0, **options)
        assert our_loss == pytest.approx(loss, rel=1e-6)
        assert_same_gradients(our_gradients, gradients, tolerance=1e-6)
        return loss

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_loss_and_every_gradient(self, layout, tiny_model, tokenizer, token_rows, tmp_path):
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **LAYOUTS[layout]}
        self.check_step(tiny_model, tokenizer, token_rows, tmp_path, **options)

    def test_mixture_of_experts_with_accumulation(self, moe_model, tokenizer, token_rows, tmp_path):
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
        common = (moe_model, tokenizer, token_rows, tmp_path)
        loss = self.check_step(*common, **options)
        assert loss != one_step(SFTTrainer, SFTConfig, *common, router_aux_loss_coef=0.0, **options)[0]

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
        self.check_step(tiny_model, tokenizer, token_rows, tmp_path, **options)

    def test_evaluation(self, model, tokenizer, token_rows, tmp_path):
        options = {"eval_dataset": token_rows, "per_device_eval_batch_size": 4}
        common = (model, tokenizer, token_rows, tmp_path)
        plain = make_trainer(SFTTrainer, SFTConfig, *common, **options).evaluate()
        ours = make_trainer(SFTGOTrainer, SFTGOConfig, *common, worst_group_weight=0, **options).evaluate()
        assert ours["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
        log_probs = [padded_document_log_probs(model, row["input_ids"], row["labels"]) for row in token_rows]
        nll = [-log_prob for row in log_probs for log_prob in row if log_prob is not None]
        assert ours["eval_nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)  # of tokens, not of batches


class TestSplitsOfABatch:
    """The same global batch gives the same loss and gradients however it is cut."""

    @pytest.mark.parametrize("sample_weighting", ["tokens", "uniform"])
    @pytest.mark.parametrize("groups", [{"group_by": "tfidf"}, {"group_by": "column", "group_column": "mine"}])
    def test_every_split(self, groups, sample_weighting, step, grouped_rows):
        rows = grouped_rows.select(range(8))
        options = {"sample_weighting": sample_weighting, **groups}
        loss, gradients = step(rows, per_device_train_batch_size=8, **options)
        for batch_size, num_steps, layout in (
            (2, 4, {}),
            (1, 8, {}),
            (3, 1, {"packing": True}),
            (1, 3, {"packing": True}),
            (4, 2, {"padding_free": True, "max_length": None}),
        ):
            split = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": num_steps, **layout}
            split_loss, split_gradients = step(rows, **options, **split)
            assert split_loss == pytest.approx(loss, rel=1e-6), split
            assert_same_gradients(split_gradients, gradients, tolerance=1e-6)

    def test_metrics_of_every_split(self, make, token_rows):
        logs = []
        for batch_size, num_steps in ((8, 1), (2, 4), (1, 8)):
            split = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": num_steps}
            trainer = make(token_rows.select(range(8)), max_steps=1, **split)
            trainer.train()
            logs.append({name: value for name, value in trainer.state.log_history[0].items() if "nll" in name})
        assert len(logs[0]) == 3
        assert logs[1] == pytest.approx(logs[0]) and logs[2] == pytest.approx(logs[0])

    def test_packed_rows_are_few(self, make, token_rows):
        assert len(make(token_rows.select(range(8)), packing=True).train_dataset) == 3

    def test_micro_batch_scope_depends_on_the_split(self, step, grouped_rows):
        options = {"group_by": "column", "group_column": "mine", "group_scope": "micro_batch"}
        rows = grouped_rows.select(range(8))
        whole, _ = step(rows, per_device_train_batch_size=8, **options)
        parts, _ = step(rows, per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
        assert whole < parts  # a maximum of means is at most the mean of maxima


class TestLossFromTheModelsLogits:
    """The logged loss against the formula on log-probabilities from the model's own logits."""

    @pytest.mark.parametrize("layout", [{}, {"packing": True}], ids=["padded", "packed"])
    @pytest.mark.parametrize("scope", ["sample", "micro_batch"])
    @pytest.mark.parametrize("weighting", ["tokens", "uniform"])
    @pytest.mark.parametrize("weight", [0.9, 1.0])
    def test_value(self, layout, scope, weighting, weight, step, tiny_model, grouped_rows):
        rows = grouped_rows.select(range(6))
        loss, _ = step(
            rows, group_by="column", group_column="mine", group_scope=scope, sample_weighting=weighting,
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
    def test_tfidf_marks_the_asked_share_of_the_labels(self, make, tokenizer, chat_rows):
        for row in make(chat_rows, important_fraction=0.3).train_dataset:
            supervised = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
            groups = [row["group_ids"][t] for t in supervised]
            assert groups.count(1) == round(0.3 * len(supervised)) and groups.count(-1) == 0
            end_of_turn = [t for t in supervised if row["labels"][t] == tokenizer.eos_token_id]
            assert [row["group_ids"][t] for t in end_of_turn] == [1]
            assert all(row["group_ids"][t] == -1 for t in range(len(row["labels"])) if t not in supervised)

    def test_groups_are_made_after_truncation(self, make, token_rows):
        for layout in ({}, {"packing": True}):
            for batch in make(token_rows, max_length=14, min_grouped_tokens=0, **layout).get_train_dataloader():
                groups = batch["group_ids"][:, 1:][batch["labels"][:, 1:] != -100]
                assert groups.min() == 0 and groups.max() == 1

    def test_own_scores(self, make, token_rows):
        rows = token_rows.add_column("mine", [[float(t) for t in range(len(ids))] for ids in token_rows["input_ids"]])
        options = {"group_by": "column", "importance_column": "mine", "special_tokens_important": False}
        first = make(rows, max_length=20, **options).train_dataset[0]
        assert len(first["input_ids"]) == len(first["group_ids"]) == 20
        supervised = [t for t, label in enumerate(first["labels"]) if t > 0 and label != -100]
        num_important = round(0.5 * len(supervised))
        assert [t for t in supervised if first["group_ids"][t] == 1] == supervised[-num_important:]

    @pytest.mark.parametrize("max_length, kept", [(9, slice(-9, None)), (None, slice(None))])
    def test_own_columns_are_cut_from_the_same_end(self, max_length, kept, make, grouped_rows):
        options = {"group_by": "column", "group_column": "mine", "truncation_mode": "keep_end"}
        with pytest.warns(FutureWarning, match="keep_end"):
            trainer = make(grouped_rows, max_length=max_length, **options)
        assert trainer.train_dataset[0]["group_ids"] == grouped_rows[0]["mine"][kept]

    @pytest.mark.parametrize("data_format", ["numpy", "torch", "pandas"])
    def test_formatted_data(self, data_format, make, grouped_rows):
        trainer = make(grouped_rows.with_format(data_format), group_by="column", group_column="mine")
        assert trainer.train_dataset[0]["group_ids"] == grouped_rows[0]["mine"]

    def test_evaluation_uses_the_training_sets_frequencies(self, make, chat_rows):
        trainer = make(chat_rows, eval_dataset=chat_rows.select([3, 4]))
        assert trainer.eval_dataset[0]["importance_scores"] == trainer.train_dataset[3]["importance_scores"]
        assert "eval_sft_go/important_nll" in trainer.evaluate(chat_rows.select([0]).to_iterable_dataset())


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

    @pytest.fixture
    def stream(self, make):
        return lambda rows, **options: make(rows.to_iterable_dataset(), **{**self.options, **options})

    def assert_same_weights(self, first, second):
        for (name, weights), other in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
            assert torch.equal(weights, other), name

    def test_equals_a_file_fitted_on_the_same_rows(self, make, stream, chat_rows, tmp_path):
        file = str(tmp_path / "idf.npz")
        make(chat_rows.select(range(5)), tfidf_file=file)
        evaluation = {"eval_dataset": chat_rows.select(range(5, 9)).to_iterable_dataset()}
        fitted = stream(chat_rows, output_dir=tmp_path / "a", **evaluation)
        with_file = stream(chat_rows, output_dir=tmp_path / "b", tfidf_file=file, **evaluation)
        for name in ("train_dataset", "eval_dataset"):
            first, second = ([row["group_ids"] for row in getattr(of, name)] for of in (fitted, with_file))
            assert first == second and {1, 0} <= set(first[0])
        fitted.train(), with_file.train()
        assert fitted.state.global_step == 3
        self.assert_same_weights(fitted, with_file)

    def test_resume(self, stream, chat_rows, tmp_path):
        checkpoint = str(tmp_path / "checkpoint-1")
        unbroken, resumed = stream(chat_rows), stream(chat_rows)
        unbroken.train()
        resumed.train(resume_from_checkpoint=checkpoint)
        self.assert_same_weights(resumed, unbroken)
        # Later rows may change, but not those that the frequencies are fitted on
        rest = chat_rows.select([0, 1, 2, 3, 4, 11, 10, 9, 8, 7, 6, 5])
        assert stream(rest).checkpoint_to_resume(checkpoint)
        message = r"`document_frequencies` was '\w{16} \(of the start of the stream\)', is now '\w{16} \(of the start"
        with pytest.raises(InputError, match=message):
            stream(chat_rows.select(range(1, 12))).train(resume_from_checkpoint=checkpoint)


class TestPreparedSets:
    """A training set that comes annotated and packed."""

    def test_document_frequencies_are_of_the_training_set(self, make, tokenizer, chat_rows, tmp_path):
        rows, held_out = chat_rows.select(range(8)), chat_rows.select(range(8, 12))
        options = {"packing": True, "completion_only_loss": True, "eval_dataset": held_out}
        first = make(rows, **options)
        file = tmp_path / "idf.npz"
        second = make(first.train_dataset, tfidf_file=str(file), **options)
        expected = TokenTfidf.fit(make(rows).train_dataset, tokenizer)
        assert second._tfidf.digest() == TokenTfidf.load(file, tokenizer).digest() == expected.digest()
        assert second.eval_dataset[:] == first.eval_dataset[:]

    def test_resume_with_other_rows(self, make, chat_rows, tmp_path):
        checkpoint = str(tmp_path / "checkpoint-1")
        options = {"packing": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        first = make(chat_rows.select(range(8)), **options)
        first.train()
        prepared = make(first.train_dataset, **options)
        prepared.train(resume_from_checkpoint=checkpoint)  # prepared here or before
        assert prepared.state.global_step == 2
        others = make(chat_rows.select(range(4, 12)), **options).train_dataset
        with pytest.raises(InputError, match="was made with .* training examples, and the .* of this run differ"):
            make(others, **options).train(resume_from_checkpoint=checkpoint)


class TestSchedule:
    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [
            ("constant", [0.8, 0.8, 0.8, 0.8]),
            ("linear", [0.8, 0.65, 0.5, 0.35]),
            ("cosine", [0.2 + 0.6 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]),
        ],
    )
    def test_weight_changes_over_the_run(self, schedule, expected, make, token_rows):
        """That of evaluation does not."""
        trainer = make(
            token_rows, max_steps=4, save_strategy="no", learning_rate=0.0, worst_group_weight=0.8,
            worst_group_weight_end=0.2, worst_group_schedule=schedule, eval_dataset=token_rows, eval_strategy="steps",
            eval_steps=1,
        )  # fmt: skip
        trainer.train()
        logged = [log["sft_go/worst_group_weight"] for log in trainer.state.log_history if "loss" in log]
        assert logged == pytest.approx(expected)
        assert len({log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}) == 1


class TestMetrics:
    def log_of(self, trainer):
        trainer.train()
        return trainer.state.log_history[0]

    def test_two_groups(self, make, token_rows):
        """With every token in a group, the loss follows from the logged group means of one sample."""
        log = self.log_of(make(token_rows.select([0]), max_steps=1))
        worst = max(log["sft_go/important_nll"], log["sft_go/unimportant_nll"])
        assert log["loss"] == pytest.approx(0.1 * log["nll"] + 0.9 * worst, rel=1e-5)
        assert log["sft_go/important_is_worst"] == (log["sft_go/important_nll"] == worst)
        assert {"entropy", "mean_token_accuracy", "num_tokens"} <= log.keys()

    def test_own_groups(self, make, token_rows):
        rows = token_rows.filter(lambda row: len(row["input_ids"]) > 7)
        groups = [[row % 2 * (t % 3) for t in range(len(ids))] for row, ids in enumerate(rows["input_ids"])]
        options = {"group_by": "column", "group_column": "mine", "per_device_train_batch_size": 16}
        log = self.log_of(make(rows.add_column("mine", groups), max_steps=1, **options))
        # Half of the rows have all three groups, the other half one: only the former have a worst group
        assert sum(log[f"sft_go/group_{group}_is_worst"] for group in range(3)) == pytest.approx(1)
        assert "sft_go/group_3_nll" not in log and "sft_go/group_3_is_worst" not in log

    def test_groups_stand_on_their_tokens_under_prompt_tuning(self, make, grouped_rows):
        """Virtual tokens are prepended: the groups' means must be those of the real tokens."""
        row = grouped_rows.select([0])
        peft_config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
        trainer = make(row, group_by="column", group_column="mine", max_steps=1, peft_config=peft_config)
        labels, groups = row[0]["labels"], row[0]["mine"]
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor(row["input_ids"][:])).logits[0]
        log_probs = logits[-len(labels) - 1 : -1].log_softmax(-1)
        log = self.log_of(trainer)
        for group in range(4):
            nll = [-log_probs[t, labels[t]] for t in range(1, len(labels)) if labels[t] != -100 and groups[t] == group]
            assert log[f"sft_go/group_{group}_nll"] == pytest.approx(float(sum(nll)) / len(nll))


class TestEdges:
    def test_nothing_to_learn_in_a_micro_batch(self, step):
        rows = Dataset.from_dict({"input_ids": [[3, 4, 5], [6, 7, 8]], "labels": [[-100] * 3, [6, 7, 8]]})
        options = {"max_length": None, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        loss, gradients = step(rows, **options)
        alone, gradients_alone = step(rows.select([1]), **options)
        assert loss == pytest.approx(alone)
        assert_same_gradients(gradients, gradients_alone, tolerance=1e-6)

    def test_short_samples_have_cross_entropy(self, step, tiny_model, tokenizer, token_rows, tmp_path, caplog):
        loss, _ = one_step(SFTTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path)
        assert step(token_rows, min_grouped_tokens=40)[0] == pytest.approx(loss)
        assert "No token of the train dataset is in a group" in caplog.text
        assert step(token_rows, min_grouped_tokens=2)[0] > loss

    def test_wrapped_packing_warns(self, make, token_rows, caplog):
        make(token_rows, packing=True, packing_strategy="wrapped")
        assert "each packed row counts as one sample" in caplog.text

    def test_own_groups_without_preparation(self, step, grouped_rows):
        rows = grouped_rows.rename_column("mine", "group_ids")
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "group_by": "column", "group_column": "group_ids"}
        assert step(rows, **options)[0] == step(grouped_rows, group_by="column", group_column="mine")[0]

    def test_counts_that_are_not_known(self, make, token_rows):
        trainer = make(token_rows, sample_weighting="uniform")
        batch = next(iter(trainer.get_train_dataloader()))
        with pytest.raises(KeyError, match="The number of `samples` in the optimizer step is not known"):
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(100))
        # Without a count the micro-batch counts for itself, and the batch can be used again
        assert trainer.compute_loss(trainer.model, batch) == trainer.compute_loss(trainer.model, batch)


class TestBadInput:
    @pytest.mark.parametrize(
        "values, message",
        [
            (None, "The train dataset has no column `mine`; it has"),
            (lambda ids: 1, "Row 0 of the train dataset: column `mine` has 1, but"),
            (lambda ids: [0.5] * len(ids), "column `mine` has the group id 0.5"),
        ],
    )
    def test_own_column(self, values, message, make, token_rows):
        rows = token_rows
        if values is not None:
            rows = rows.add_column("mine", list(map(values, rows["input_ids"])))
        with pytest.raises(ValueError, match=message):
            make(rows, group_by="column", group_column="mine")

    @pytest.mark.parametrize("layout", [{}, {"packing": True}, {"max_length": None}, {"max_length": 6}], ids=str)
    def test_scores_of_another_length(self, layout, make, token_rows):
        scores = [[0.5] * len(ids) for ids in token_rows["input_ids"]]
        scores[5].append(0.5)
        with pytest.raises(ValueError, match=r"Row 5 of the train dataset: column `mine` has 9 values, but .* 8"):
            make(token_rows.add_column("mine", scores), group_by="column", importance_column="mine", **layout)

    @pytest.mark.parametrize("layout", [{}, {"packing": True}, {"max_length": None}], ids=str)
    def test_no_supervised_token(self, layout, make, token_rows):
        rows = token_rows.map(lambda row: {"labels": [row["labels"][0]] + [-100] * (len(row["labels"]) - 1)})
        with pytest.raises(ValueError, match="The train dataset has no supervised token"):
            make(rows, **layout)
