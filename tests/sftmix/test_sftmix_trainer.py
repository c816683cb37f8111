"""The trainer: limit cases, losses and gradients against a dense reference, splits of a batch, refusals."""

import copy
import math
from functools import partial
from itertools import pairwise

import helpers
import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import SMALL, GradientRecorder, assert_same_gradients
from trl import SFTConfig, SFTTrainer

from hf_sft_variants import SFTMixConfig, SFTMixTrainer
from hf_sft_variants.base.example_keys import EXAMPLE_KEY, add_content_keys
from hf_sft_variants.errors import InputError
from hf_sft_variants.lm_head import autograd
from hf_sft_variants.scoring.shards import write_parquet
from hf_sft_variants.sftmix.confidence_file import confidence_table
from hf_sft_variants.sftmix.pairing import CONFIDENT, NEITHER, UNCONFIDENT


RANDOM = {"confidence_split": "random", "train_sampling_strategy": "random"}
PADDED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
PADDING_FREE = {"per_device_train_batch_size": 8, "padding_free": True, "max_length": None}
PACKED = {"packing": True, "per_device_train_batch_size": 4}


class RecordingTrainer(SFTMixTrainer):
    """Keeps the micro-batches that reach the loss."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.__dict__.setdefault("batches", []).append(inputs)
        return super().training_step(model, inputs, num_items_in_batch)


make_trainer = partial(helpers.make_trainer, RecordingTrainer, SFTMixConfig)
one_step_log = partial(helpers.one_step_log, SFTMixTrainer, SFTMixConfig)
OTHER_SPLITS = {
    "2x4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "4x2": PADDED,
    "padding_free": PADDING_FREE,
}


def recorded_step(*args, **options):
    """The trainer after one step, what it logged, and the gradients."""
    recorder = GradientRecorder()
    trainer = make_trainer(*args, callbacks=[recorder], max_steps=1, save_strategy="no", **options)
    trainer.train()
    return trainer, trainer.state.log_history[0], recorder.gradients


def confidence_file(path, rows, mean_nll):
    """A confidence file for pre-tokenized rows."""
    keyed = add_content_keys(rows.select_columns(["input_ids", "labels"]))
    num_labels = np.array([sum(label != -100 for label in labels[1:]) for labels in rows["labels"]])
    write_parquet(
        confidence_table(keyed[EXAMPLE_KEY][:], num_labels, {1: np.array(mean_nll)}, "mean_nll", "column"), path
    )
    return {"confidence_source": "file", "confidence_file": str(path)}


# A slow reference: each document alone, mixed hidden states, dense logits, soft labels


def spans_of(inputs):
    """Row, first and last token of each document."""
    if "position_ids" in inputs:
        position_ids = inputs["position_ids"][0]
        starts = (position_ids == 0).nonzero().flatten().tolist()
        return [(0, start, end) for start, end in pairwise([*starts, len(position_ids)])]
    return [(row, 0, int(mask.sum())) for row, mask in enumerate(inputs["attention_mask"])]


def pairs_of(inputs, spans):
    """Pairs of documents with their λ, read from the positions."""
    num_predictions = inputs["labels"].size(1) - 1
    pairs = {}
    for first, second, weight in zip(
        inputs["mixup_first"].tolist(), inputs["mixup_second"].tolist(), inputs["mixup_weights"], strict=True
    ):
        documents = []
        for row, column in (first, second):
            token = column + num_predictions + 1
            (document,) = [i for i, (r, start, end) in enumerate(spans) if r == row and start <= token < end]
            documents.append(document)
        assert pairs.setdefault(tuple(documents), weight) == weight
    return pairs


def drawn_lambda(seed, step, first, second, alpha):
    """As the package documents it: the pair's numbers in the high words of the counter."""
    philox = np.random.Philox(
        key=np.array([seed, step], np.uint64), counter=np.array([0, 0, first, second], np.uint64)
    )
    return np.float32(np.random.Generator(philox).beta(alpha, alpha))


def slow_loss(model, trainer, batches, halves):
    """Loss of a step, and what is logged of it."""
    ntp, mixup, share_sum, num_tokens, num_mixed = 0.0, 0.0, 0.0, 0, 0
    of_halves = {CONFIDENT: [0.0, 0], UNCONFIDENT: [0.0, 0], NEITHER: [0.0, 0]}
    base_model = getattr(model, "get_base_model", lambda: model)()
    args = trainer.args
    for inputs in batches:
        spans = spans_of(inputs)
        hidden, labels, numbers = [], [], []
        for row, start, end in spans:
            states = base_model.model(input_ids=inputs["input_ids"][row : row + 1, start:end]).last_hidden_state[0]
            targets = inputs["labels"][row, start + 1 : end]
            hidden.append(states[:-1][targets != -100])
            labels.append(targets[targets != -100])
            numbers.append(inputs["example_number"][row, start].item())
        pairs = pairs_of(inputs, spans)
        with_labels = [halves[number].item() for number, of in zip(numbers, labels, strict=True) if len(of)]
        assert len(pairs) == min(with_labels.count(CONFIDENT), with_labels.count(UNCONFIDENT))
        assert len({document for pair in pairs for document in pair}) == 2 * len(pairs)
        head, vocab = base_model.lm_head, base_model.config.vocab_size
        for number, states, targets in zip(numbers, hidden, labels, strict=True):
            nll = -head(states).double().log_softmax(-1)[range(len(targets)), targets].sum()
            of_half = of_halves[halves[number].item()]
            of_half[0], of_half[1] = of_half[0] + nll.item(), of_half[1] + len(targets)
            ntp, num_tokens = ntp + nll, num_tokens + len(targets)
        for (i, j), share in pairs.items():
            assert (halves[numbers[i]], halves[numbers[j]]) == (CONFIDENT, UNCONFIDENT)
            assert share == drawn_lambda(args.seed, 0, numbers[i], numbers[j], args.mixup_alpha)
            size = min(len(labels[i]), len(labels[j]))
            log_p = head(share * hidden[i][:size] + (1 - share) * hidden[j][:size]).double().log_softmax(-1)
            one_hot = torch.nn.functional.one_hot
            soft = share * one_hot(labels[i][:size], vocab) + (1 - share) * one_hot(labels[j][:size], vocab)
            mixup = mixup - (soft * log_p).sum()
            num_mixed, share_sum = num_mixed + size, share_sum + size * share
    ntp, mixup = ntp / num_tokens, mixup / num_mixed
    loss = args.ntp_weight * ntp + args.mixup_weight * mixup
    return loss, {
        "loss": loss.item(),
        "nll": ntp.item(),
        "sftmix/mixup_loss": mixup.item(),
        "sftmix/mixed_fraction": 2 * num_mixed / num_tokens,
        "sftmix/mean_lambda": share_sum / num_mixed,
        "sftmix/confident_nll": of_halves[CONFIDENT][0] / of_halves[CONFIDENT][1],
        "sftmix/unconfident_nll": of_halves[UNCONFIDENT][0] / of_halves[UNCONFIDENT][1],
    }


def assert_like_slow_reference(start, trainer, log, gradients):
    model = copy.deepcopy(start)
    loss, metrics = slow_loss(model, trainer, trainer.batches, trainer.halves)
    loss.backward()
    assert {name: log[name] for name in metrics} == pytest.approx(metrics, rel=1e-5)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(expected, gradients, tolerance=5e-6)


class TestLoss:
    @pytest.mark.parametrize("options", [PADDED, PADDING_FREE, PACKED, {**PACKED, "gradient_accumulation_steps": 2}])
    @pytest.mark.parametrize(
        "method", [{}, {"mixup_weight": 0.7, "mixup_alpha": 2.0, "ntp_weight": 0.3}, {"ntp_weight": 0.0}], ids=str
    )
    def test_slow_reference(self, tiny_model, tokenizer, token_rows, tmp_path, options, method):
        options = {"seed": 5, **method, **options}
        source = confidence_file(tmp_path / "c.parquet", token_rows, [5, 1, 3, 8, 2, 9, 4, 6, 7, 5, 1, 2, 8, 9, 3, 0])
        result = recorded_step(tiny_model, tokenizer, token_rows, tmp_path, **source, **options)
        assert_like_slow_reference(tiny_model, *result)

    @pytest.mark.parametrize("num_rows, batch_size", [(7, 8), (8, 3), (5, 1)])
    def test_examples_without_a_partner(
        self, tiny_model, tokenizer, token_rows, tmp_path, caplog, num_rows, batch_size
    ):
        rows = token_rows.select(range(num_rows))
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size}
        trainer, log, gradients = recorded_step(tiny_model, tokenizer, rows, tmp_path, **RANDOM, **options)
        if batch_size == 1:  # no batch holds a pair
            assert log["loss"] == pytest.approx(log["nll"], rel=1e-6) and "sftmix/mixup_loss" not in log
            assert math.isfinite(log["grad_norm"]) and "sftmix/mean_lambda" not in log
        else:
            assert_like_slow_reference(tiny_model, trainer, log, gradients)
        assert (f"{num_rows} examples with labels make no equal halves" in caplog.text) == (num_rows % 2 == 1)

    @pytest.mark.parametrize("options", OTHER_SPLITS.values(), ids=OTHER_SPLITS)
    def test_other_splits_of_the_batch(self, tiny_model, tokenizer, token_rows, tmp_path, options):
        arguments = (tiny_model, tokenizer, token_rows, tmp_path)
        expected, gradients = one_step_log(*arguments, per_device_train_batch_size=8, **RANDOM)
        log, other_gradients = one_step_log(*arguments, **options, **RANDOM)
        names = ["loss", "nll", *(name for name in expected if name.startswith("sftmix/"))]
        assert len(names) == 7
        assert {name: log[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=1e-6)
        assert_same_gradients(gradients, other_gradients, tolerance=1e-6)

    def test_a_loop_of_your_own_draws_new_pairs_each_epoch(self, tiny_model, tokenizer, token_rows, tmp_path):
        batches = make_trainer(tiny_model, tokenizer, token_rows, tmp_path, **PADDED, **RANDOM).get_train_dataloader()
        first, second = ([batch["example_number"].tolist() for batch in batches] for _ in range(2))
        assert first != second

    def test_packed_equals_padded(self, tiny_model, tokenizer, token_rows, tmp_path):
        arguments = (tiny_model, tokenizer, token_rows.select([0, 2]), tmp_path)
        padded, gradients = one_step_log(*arguments, per_device_train_batch_size=2, **RANDOM)
        packed, packed_gradients = one_step_log(*arguments, **PACKED, **RANDOM)  # one pair, so the same one
        assert padded["loss"] == pytest.approx(packed["loss"], rel=1e-6)
        assert_same_gradients(gradients, packed_gradients, tolerance=2e-6)


class TestOracles:
    def two_rows(self, first, second):
        return Dataset.from_list([{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in (first, second)])

    def log(self, tiny_model, tokenizer, tmp_path, first, second, **options):
        arguments = (tiny_model, tokenizer, self.two_rows(first, second), tmp_path)
        return one_step_log(*arguments, per_device_train_batch_size=2, **RANDOM, **options)

    def test_identical_rows_do_not_depend_on_lambda(self, tiny_model, tokenizer, tmp_path):
        for seed in range(3):
            log, _ = self.log(tiny_model, tokenizer, tmp_path, [5, 6, 7, 8], [5, 6, 7, 8], seed=seed)
            assert log["sftmix/mixup_loss"] == pytest.approx(log["nll"], rel=1e-6)
            assert log["loss"] == pytest.approx(1.2 * log["nll"], rel=1e-6)

    def test_lambda_of_one_is_the_loss_of_the_confident_row(self, tiny_model, tokenizer, tmp_path):
        seen = set()
        for seed in range(8):
            log, _ = self.log(tiny_model, tokenizer, tmp_path, [5, 6, 7], [9, 10, 11], seed=seed, mixup_alpha=1e-4)
            share = log["sftmix/mean_lambda"]
            seen.add(share)
            name = {1.0: "sftmix/confident_nll", 0.0: "sftmix/unconfident_nll"}[share]
            assert log["sftmix/mixup_loss"] == pytest.approx(log[name], rel=1e-6)
        assert seen == {0.0, 1.0}

    def test_tokens_past_the_common_length_change_next_token_loss_only(self, tiny_model, tokenizer, tmp_path):
        log, _ = self.log(tiny_model, tokenizer, tmp_path, [5, 6, 7], [9, 10, 11, 12, 13])
        other, _ = self.log(tiny_model, tokenizer, tmp_path, [5, 6, 7], [9, 10, 11, 40, 50])
        assert log["sftmix/mixup_loss"] == other["sftmix/mixup_loss"] and log["nll"] != other["nll"]
        assert log["sftmix/mixed_fraction"] == pytest.approx(4 / 6)

    def test_gradient_reaches_both_rows(self, tiny_model, tokenizer, tmp_path):
        tiny_model.config.tie_word_embeddings = False
        tiny_model.lm_head.weight = torch.nn.Parameter(tiny_model.lm_head.weight.detach().clone())
        _, gradients = self.log(tiny_model, tokenizer, tmp_path, [5, 6, 7], [9, 10, 11], ntp_weight=0.0)
        has_gradient = gradients["model.embed_tokens.weight"].abs().sum(1) > 0
        assert has_gradient.nonzero().flatten().tolist() == [5, 6, 9, 10]


class TestLimitCaseIsSFTTrainer:
    def test_needs_no_confidence(self, tmp_path):
        args = SFTMixConfig(str(tmp_path), **SMALL, mixup_weight=0.0, pair_sampling=False)
        assert not args.needs_confidence and not args.needs_reference

    @pytest.mark.parametrize("options", [PADDED, PADDING_FREE])
    def test_no_mixup_in_the_same_batches(self, tiny_model, tokenizer, token_rows, tmp_path, options):
        options = {**options, "seed": 4}
        trainer, log, gradients = recorded_step(
            tiny_model, tokenizer, token_rows, tmp_path, **options, **RANDOM, mixup_weight=0.0
        )
        order = [
            inputs["example_number"][row, start].item()
            for inputs in trainer.batches
            for row, start, _ in spans_of(inputs)
        ]
        assert trainer.halves[order].tolist() == [1, 0] * 4
        assert not any(name.startswith("mixup") for inputs in trainer.batches for name in inputs)
        plain, plain_gradients = helpers.one_step(
            SFTTrainer, SFTConfig, tiny_model, tokenizer, token_rows.select(order), tmp_path, **options
        )
        assert log["loss"] == pytest.approx(plain, rel=1e-6)
        assert_same_gradients(gradients, plain_gradients, tolerance=1e-6)
        # The same batches with mixup
        other = recorded_step(tiny_model, tokenizer, token_rows, tmp_path, **options, **RANDOM)[0]
        for inputs, mixed in zip(trainer.batches, other.batches, strict=True):
            assert torch.equal(inputs["input_ids"], mixed["input_ids"])


def test_evaluation_is_next_token_loss(tiny_model, tokenizer, token_rows, tmp_path):
    options = {"eval_dataset": token_rows, "per_device_eval_batch_size": 3}
    plain = helpers.make_trainer(SFTTrainer, SFTConfig, tiny_model, tokenizer, token_rows, tmp_path, **options)
    ours = make_trainer(tiny_model, tokenizer, token_rows, tmp_path, ntp_weight=0.5, **options, **RANDOM)
    result = ours.evaluate()
    assert result["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    assert "eval_nll" in result and not any("sftmix" in name for name in result)
    assert ours.evaluate({"train": token_rows})["eval_train_loss"] == result["eval_loss"]
    assert len(ours.train_examples) == len(ours.halves) == len(token_rows)


def test_a_callers_own_loop(tiny_model, tokenizer, token_rows, tmp_path):
    """A micro-batch that does not come from `get_batch_samples` has no pairs: it is next-token loss."""
    trainer = make_trainer(tiny_model, tokenizer, token_rows, tmp_path, **RANDOM)
    inputs = next(iter(trainer.get_train_dataloader()))
    plain_inputs = {name: values for name, values in inputs.items() if name != "example_number"}
    loss = trainer.compute_loss(trainer.model.train(), inputs)
    assert loss.item() == pytest.approx(tiny_model(**plain_inputs).loss.item(), rel=1e-5)


class TestInsideTheMicroBatch:
    """Data without numbers: streams, `wrapped` and `bfd_split` packing."""

    @pytest.mark.parametrize(
        "options",
        [
            {"stream": True, "per_device_train_batch_size": 5},
            {"stream": True, "packing": True, "per_device_train_batch_size": 2},
            {"packing": True, "packing_strategy": "wrapped", "max_length": 20, "per_device_train_batch_size": 4},
            {"packing": True, "packing_strategy": "bfd_split", "max_length": 20, "per_device_train_batch_size": 4},
            {"dataset_kwargs": {"skip_prepare_dataset": True}, "per_device_train_batch_size": 4},
        ],
        ids=str,
    )
    def test_pairs(self, tiny_model, tokenizer, token_rows, tmp_path, options):
        options = dict(options)
        rows = token_rows.to_iterable_dataset() if options.pop("stream", False) else token_rows
        trainer, log, gradients = recorded_step(tiny_model, tokenizer, rows, tmp_path, **options, **RANDOM)
        (inputs,) = trainer.batches
        pairs = pairs_of(inputs, spans_of(inputs))
        with_labels = [
            i
            for i, (r, start, end) in enumerate(spans_of(inputs))
            if (inputs["labels"][r, start + 1 : end] != -100).any()
        ]
        assert list(pairs) == list(zip(with_labels[::2], with_labels[1::2], strict=False)) and pairs
        assert len(set(pairs.values())) == len(pairs)
        assert log["loss"] == pytest.approx(log["nll"] + 0.2 * log["sftmix/mixup_loss"], rel=1e-6)
        again = recorded_step(tiny_model, tokenizer, rows, tmp_path, **options, **RANDOM)
        assert again[1]["loss"] == log["loss"]
        assert_same_gradients(gradients, again[2])

    def test_equal_responses_to_different_prompts_are_mixed_differently(self, tiny_model, tokenizer, tmp_path):
        """Also where they stand in one stream, without numbers."""
        rows = Dataset.from_list([
            {"input_ids": [5 + row, 6, 7, 90 + row % 2, 3], "labels": [-100, -100, -100, 90 + row % 2, 3]}
            for row in range(8)
        ])  # fmt: skip
        stream = rows.to_iterable_dataset()
        trainer, *_ = recorded_step(tiny_model, tokenizer, stream, tmp_path, **RANDOM)
        assert len(set(trainer.batches[0]["mixup_weights"])) == 4


@pytest.mark.parametrize("kept_bytes, products_with_the_head", [(0, 4), (2**27, 3)])
def test_a_step_has_no_more_products_than_sft_trainer(
    kept_bytes, products_with_the_head, tiny_model, tokenizer, tmp_path, monkeypatch
):
    """Mixing takes no matrix product of its own."""
    monkeypatch.setattr(autograd, "KEPT_BYTES", kept_bytes)
    rows = Dataset.from_dict({"input_ids": torch.arange(3, 123).view(8, 15).tolist()})
    products = []
    for classes, method in (((SFTTrainer, SFTConfig), {}), ((SFTMixTrainer, SFTMixConfig), RANDOM)):
        trainer = helpers.make_trainer(
            *classes, tiny_model, tokenizer, rows, tmp_path, per_device_train_batch_size=8, **method
        )
        (inputs,), num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
        with helpers.Operations() as operations:
            trainer.training_step(trainer.model, inputs, num_items)
        products.append(operations.products)
    assert len(inputs["mixup_weights"]) == 4 * 14  # all labels are mixed
    of_head = 8 * 14 * tiny_model.lm_head.weight.numel()
    assert [found.count(of_head) for found in products] == [4, products_with_the_head]
    others = [[product for product in found if product != of_head] for found in products]
    assert others[0] == others[1]


def test_data_seed_decides_on_the_pairs(tiny_model, tokenizer, token_rows, tmp_path):
    orders = [
        list(make_trainer(tiny_model, tokenizer, token_rows, tmp_path, **seeds, **RANDOM)._get_train_sampler())
        for seeds in ({"data_seed": 1}, {"data_seed": 2}, {"data_seed": 2, "seed": 42})
    ]
    assert orders[0] != orders[1] == orders[2]


def test_compiles_once(tiny_model, tokenizer, token_rows, tmp_path):
    """Whatever the number of mixed positions."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    options = {"torch_compile": True, "torch_compile_backend": "eager", "per_device_train_batch_size": 4}
    make_trainer(
        tiny_model, tokenizer, token_rows, tmp_path, max_steps=8, save_strategy="no", **options, **RANDOM
    ).train()
    assert 0 < counters["stats"]["unique_graphs"] <= 6


class TestRefusals:
    @pytest.mark.parametrize(
        "options",
        [
            {"per_device_train_batch_size": 3, "confidence_split": "random"},
            {"per_device_train_batch_size": 3, "packing": True},
            {"per_device_train_batch_size": 3, "pair_sampling": False, "mixup_weight": 0.0},
            {"packing": True, "train_sampling_strategy": "sequential"},
            {"packing": True, "packing_strategy": "wrapped", "confidence_split": "random"},
        ],
    )
    def test_accepted(self, tmp_path, options):
        SFTMixConfig(str(tmp_path), **SMALL, **options)

    def test_too_few_examples(self, tiny_model, tokenizer, token_rows, tmp_path):
        for method in ({}, RANDOM):
            with pytest.raises(InputError, match="1 example of the train dataset has labels, but a pair takes two"):
                make_trainer(tiny_model, tokenizer, token_rows.select([0]), tmp_path, **method)

    @pytest.mark.parametrize("trainer_class", [SFTMixTrainer, SFTTrainer])
    def test_packed_already(self, trainer_class, tiny_model, tokenizer, token_rows, tmp_path):
        """Refused before the model is loaded, as streams are."""
        config_class, method = (SFTMixConfig, RANDOM) if trainer_class is SFTMixTrainer else (SFTConfig, {})
        arguments = (tiny_model, tokenizer, token_rows, tmp_path)
        packed = helpers.make_trainer(trainer_class, config_class, *arguments, packing=True, **method).train_dataset
        for method in ({}, RANDOM):
            with pytest.raises(InputError, match="`train_dataset` is packed already"):
                make_trainer("nowhere", tokenizer, packed, tmp_path, packing=True, **method)
        with pytest.raises(InputError, match="`confidence_split='confidence'` needs all examples before training"):
            make_trainer("nowhere", tokenizer, token_rows.to_iterable_dataset(), tmp_path, max_steps=1)

    def test_checkpoints_after_the_last_step(self, tmp_path):
        with pytest.raises(InputError, match=r"`confidence_checkpoints=\[2, 9\]` must be at most `max_steps=8`"):
            SFTMixConfig(str(tmp_path), **SMALL, max_steps=8, confidence_checkpoints=[2, 9])
