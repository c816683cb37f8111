"""What a training step of SFTMix costs beside `SFTTrainer`'s."""

import pytest
import torch
from datasets import Dataset
from helpers import Operations, make_trainer
from trl import SFTConfig, SFTTrainer

from hf_sft_variants import SFTMixConfig, SFTMixTrainer
from hf_sft_variants.lm_head import autograd


def products_of_a_step(trainer):
    """Of its matrix products, forward and backward, the multiplications; and the micro-batch."""
    (inputs,), num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    with Operations() as operations:
        trainer.training_step(trainer.model, inputs, num_items)
    return operations.products, inputs


@pytest.mark.parametrize("kept_bytes, products_with_the_head", [(0, 4), (2**27, 3)])
def test_a_step_has_no_more_products_than_sft_trainer(
    kept_bytes, products_with_the_head, tiny_model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(autograd, "KEPT_BYTES", kept_bytes)
    rows = Dataset.from_dict({"input_ids": torch.arange(3, 123).view(8, 15).tolist()})
    arguments, options = (tiny_model, tokenizer, rows, tmp_path), {"per_device_train_batch_size": 8}
    expected, _ = products_of_a_step(make_trainer(SFTTrainer, SFTConfig, *arguments, **options))
    ours = make_trainer(SFTMixTrainer, SFTMixConfig, *arguments, **options, confidence_split="random")
    products, inputs = products_of_a_step(ours)
    assert len(inputs["mixup_weights"]) == 4 * 14  # all labels are mixed
    of_head = 8 * 14 * tiny_model.lm_head.weight.numel()
    assert (expected.count(of_head), products.count(of_head)) == (4, products_with_the_head)
    assert [product for product in products if product != of_head] == [p for p in expected if p != of_head]
