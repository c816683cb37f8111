"""Losses against a slow reference and `SFTTrainer`, however the batch is laid out."""

import copy
import itertools
import math
from functools import partial

import helpers
import pytest
import torch
from datasets import Dataset
from fixtures.small_models import make_model
from helpers import assert_same_gradients
from losses import assert_as_used_is_the_slow_loss
from peft import LoraConfig, PromptTuningConfig
from trl import SFTConfig, SFTTrainer

from hf_sft_variants import WeightedSFTConfig, WeightedSFTTrainer
from hf_sft_variants.errors import InputError


COLUMNS = {"token_weight_column": "w", "example_weight_column": "quality"}
WHOLE = {
    "8x1": {"per_device_train_batch_size": 8},
    "2x4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "padding_free": {"per_device_train_batch_size": 8, "padding_free": True, "max_length": None},
    "bfd": {"packing": True, "max_length": 64, "per_device_train_batch_size": 8},
}
SPLIT = {
    strategy: {"packing": True, "packing_strategy": strategy, "max_length": 16, "per_device_train_batch_size": 16}
    for strategy in ("bfd_split", "wrapped")
}
LAYOUTS = {**WHOLE, **SPLIT}
ADAPTERS = {
    "LoRA": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
# Virtual tokens are refused in packed rows; the slow auxiliary loss of experts assumes a single micro-batch
RANDOM_CASES = [
    *itertools.product(["Llama", "LoRA"], LAYOUTS),
    *itertools.product(["Qwen3-MoE (auxiliary loss)"], [name for name in LAYOUTS if name != "2x4"]),
    *itertools.product(["prompt tuning"], ["8x1", "2x4"]),
]


@pytest.fixture(scope="module")
def weighted_rows():
    """Eight tokenized rows with masked prompts, random weights, some of them 0."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in (30, 9, 17, 12, 25, 8, 21, 14):
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        weights = torch.rand(length, generator=generator, dtype=torch.float64) * 2
        weights[torch.rand(length, generator=generator) < 0.3] = 0
        rows.append(
            {
                "input_ids": ids,
                "labels": [-100] * (length // 4) + ids[length // 4 :],
                "w": weights.tolist(),
                "quality": 0.25 + length / 16,
            }
        )
    return Dataset.from_list(rows)


@pytest.fixture
def step_log(tiny_model, tokenizer, tmp_path):
    return partial(
        helpers.one_step_log, WeightedSFTTrainer, WeightedSFTConfig, tiny_model, tokenizer, output_dir=tmp_path
    )


def slow_loss(model, rows, normalization):
    """Sum of w (-log p) over the sum of w or the number of labels whose w is not zero: one row at a time, dense."""
    total, weight_sum, num_tokens = 0.0, 0.0, 0
    for row in rows:
        log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        for position in range(1, len(row["input_ids"])):
            weight = row["w"][position] * row["quality"]
            if row["labels"][position] != -100 and weight > 0:
                total = total - weight * log_p[position - 1, row["labels"][position]]
                weight_sum, num_tokens = weight_sum + weight, num_tokens + 1
    return total / (weight_sum if normalization == "weights" else num_tokens)


def gradients_of(model, loss):
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("normalization", ["weights", "tokens"])
@pytest.mark.parametrize("layout", WHOLE)
def test_like_the_slow_reference(layout, normalization, step_log, tiny_model, weighted_rows):
    options = {
        **COLUMNS,
        **WHOLE[layout],
        "weight_normalization": normalization,
        "train_sampling_strategy": "random",
    }
    log, gradients = step_log(weighted_rows, **options)
    model = copy.deepcopy(tiny_model)
    loss = slow_loss(model, weighted_rows, normalization)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_same_gradients(gradients_of(model, loss), gradients, tolerance=1e-5)
    expected = slow_loss(tiny_model, weighted_rows, "weights").item()
    assert log["weighted/nll"] == pytest.approx(expected, rel=1e-6)
    weights = [
        weight * row["quality"]
        for row in weighted_rows
        for weight, label in zip(row["w"][1:], row["labels"][1:], strict=True)
        if weight > 0 and label != -100
    ]
    assert log["weighted/mean_weight"] == pytest.approx(sum(weights) / len(weights), rel=1e-6)


@pytest.mark.parametrize("layout", SPLIT)
def test_weights_are_split_with_their_tokens(layout, tiny_model, tokenizer, weighted_rows, tmp_path):
    options = {**COLUMNS, **SPLIT[layout]}
    arguments = (WeightedSFTTrainer, WeightedSFTConfig, tiny_model, tokenizer, weighted_rows, tmp_path)
    rows = helpers.make_trainer(*arguments, **options).train_dataset
    found = {
        (token, label): weight
        for row in rows
        for token, label, weight in zip(row["input_ids"], row["labels"], row["token_weights"], strict=True)
    }
    assert sum(len(row["input_ids"]) for row in rows) == sum(map(len, weighted_rows["input_ids"]))
    for row in weighted_rows:
        for token, label, weight in zip(row["input_ids"], row["labels"], row["w"], strict=True):
            weight = 0 if label == -100 else weight * row["quality"]
            assert found.get((token, label if weight > 0 else -100)) is not None
    total = sum(
        weight * row["quality"]
        for row in weighted_rows
        for weight, label in zip(row["w"], row["labels"], strict=True)
        if label != -100
    )
    assert math.fsum(found_weight for row in rows for found_weight in row["token_weights"]) == pytest.approx(total)


@pytest.mark.parametrize(("model", "layout"), RANDOM_CASES)
def test_random_weights(model, layout, tokenizer, weighted_rows, tmp_path):
    llama = make_model("Llama" if model in ADAPTERS else model, tokenizer)
    options = {**COLUMNS, "answer_weight": 1.0, **LAYOUTS[layout], "peft_config": ADAPTERS.get(model)}
    assert_as_used_is_the_slow_loss("weighted", llama, tokenizer, weighted_rows, tmp_path, **options)


@pytest.mark.parametrize("normalization", ["weights", "tokens"])
def test_zeros_and_ones_are_sft_trainer_with_fewer_labels(
    normalization, step_log, tiny_model, tokenizer, weighted_rows, tmp_path
):
    rows = weighted_rows.map(lambda row: {"w": [float(weight > 0.5) for weight in row["w"]], "quality": 1.0})
    masked = rows.map(
        lambda row: {"labels": [label if w else -100 for label, w in zip(row["labels"], row["w"], strict=True)]}
    )
    log, gradients = step_log(rows, **COLUMNS, weight_normalization=normalization)
    expected, expected_gradients = helpers.one_step_log(
        SFTTrainer, SFTConfig, tiny_model, tokenizer, masked.select_columns(["input_ids", "labels"]), tmp_path
    )
    assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(gradients, expected_gradients, tolerance=1e-6)
    assert log["weighted/nll"] == pytest.approx(log["nll"], rel=1e-6)


def test_tiny_weights_are_a_mean_too(step_log, weighted_rows):
    tiny = weighted_rows.map(lambda row: {"quality": 1e-6 * row["quality"]})
    assert step_log(tiny, **COLUMNS)[0]["loss"] == pytest.approx(
        step_log(weighted_rows, **COLUMNS)[0]["loss"], rel=1e-5
    )


def test_a_prepared_set_keeps_its_weights(tiny_model, tokenizer, weighted_rows, tmp_path):
    arguments = (WeightedSFTTrainer, WeightedSFTConfig, tiny_model, tokenizer)
    options = {**COLUMNS, "prompt_weight": 0.5}
    prepared = helpers.make_trainer(*arguments, weighted_rows, tmp_path, **options).train_dataset
    again = helpers.make_trainer(*arguments, prepared, tmp_path, **options).train_dataset
    for name in ("input_ids", "labels", "token_weights"):
        assert again[name][:] == prepared[name][:]
    # The normalization is no matter of the data
    helpers.make_trainer(*arguments, prepared, tmp_path, **options, weight_normalization="tokens")
    with pytest.raises(ValueError, match="`prompt_weight` was 0.5, is now 0.25"):
        helpers.make_trainer(*arguments, prepared, tmp_path, **{**options, "prompt_weight": 0.25})


def test_evaluation_is_weighted(tiny_model, tokenizer, weighted_rows, tmp_path):
    arguments = (WeightedSFTTrainer, WeightedSFTConfig, tiny_model, tokenizer, weighted_rows, tmp_path)
    trainer = helpers.make_trainer(*arguments, **COLUMNS, eval_dataset=weighted_rows, per_device_eval_batch_size=8)
    metrics = trainer.evaluate()
    expected = slow_loss(tiny_model, weighted_rows, "weights").item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["eval_weighted/nll"] == pytest.approx(expected, rel=1e-6)


def test_changed_weights_are_not_resumed(tiny_model, tokenizer, weighted_rows, tmp_path):
    arguments = (WeightedSFTTrainer, WeightedSFTConfig, tiny_model, tokenizer)
    options = {**COLUMNS, "save_strategy": "steps", "save_steps": 1}
    helpers.make_trainer(*arguments, weighted_rows, tmp_path, max_steps=1, **options).train()
    other = weighted_rows.map(lambda row: {"quality": row["quality"] / 2})
    trainer = helpers.make_trainer(*arguments, other, tmp_path, max_steps=2, **options)
    with pytest.raises(InputError, match="made with 8 training examples, and the 8 of this run differ"):
        trainer.train(resume_from_checkpoint=True)
    helpers.make_trainer(*arguments, weighted_rows, tmp_path, max_steps=2, **options).train(
        resume_from_checkpoint=True
    )
