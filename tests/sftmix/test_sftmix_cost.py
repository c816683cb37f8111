"""What a training step of SFTMix costs beside `SFTTrainer`'s."""

import torch
from datasets import Dataset
from helpers import Operations, make_trainer
from trl import SFTConfig, SFTTrainer

from hf_sft_variants import SFTMixConfig, SFTMixTrainer


def products_of_a_step(trainer):
    """Of its matrix products, forward and backward, the multiplications; and the micro-batch."""
    (inputs,), num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    with Operations() as operations:
        trainer.training_step(trainer.model, inputs, num_items)
    return operations.products, inputs


def test_a_step_has_the_products_of_sft_trainer(tiny_model, tokenizer, tmp_path):
    rows = Dataset.from_dict({"input_ids": torch.arange(3, 123).view(8, 15).tolist()})
    arguments, options = (tiny_model, tokenizer, rows, tmp_path), {"per_device_train_batch_size": 8}
    expected, _ = products_of_a_step(make_trainer(SFTTrainer, SFTConfig, *arguments, **options))
    ours = make_trainer(SFTMixTrainer, SFTMixConfig, *arguments, **options, confidence_split="random")
    products, inputs = products_of_a_step(ours)
    assert len(inputs["mixup_weights"]) == 4 * 14  # all labels are mixed
    assert products == expected
    assert products.count(8 * 14 * tiny_model.lm_head.weight.numel()) == 4
