"""`ConfidenceTrackingCallback` on every trainer."""

import pyarrow.parquet as pq
import pytest
from helpers import make_trainer, padded_document_log_probs
from methods import METHODS, SFT, every_method, needs
from transformers import AutoModelForCausalLM

import hf_sft_variants


@needs("sftmix")
@pytest.mark.cell("Callbacks", "ConfidenceTrackingCallback on any trainer: perplexities of its training data")
@pytest.mark.parametrize("packing", [False, True])
@every_method
def test_measures_the_training_data(method, packing, tiny_model, tokenizer, scored_chat_rows, tmp_path):
    trained = METHODS[method]
    trainer = make_trainer(
        *trained.classes, tiny_model, tokenizer, scored_chat_rows, tmp_path, **trained.options, packing=packing,
        max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    callback = hf_sft_variants.ConfidenceTrackingCallback(trainer, tmp_path / "confidence.parquet", checkpoints=[2])
    trainer.add_callback(callback)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    prepared = make_trainer(*SFT, tiny_model, tokenizer, scored_chat_rows, tmp_path).train_dataset
    expected = []
    for row in prepared:
        found = [p for p in padded_document_log_probs(model, row["input_ids"], row["labels"]) if p is not None]
        expected.append(-sum(found) / len(found))
    table = pq.read_table(tmp_path / "confidence.parquet")
    assert sorted(table["nll_2"].to_pylist()) == pytest.approx(sorted(expected), rel=1e-5)
    assert table["half"].to_pylist().count("confident") == 6
