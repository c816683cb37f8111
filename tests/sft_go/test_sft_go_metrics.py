import torch
from helpers import make_trainer

from hf_sft_variants import SFTGOConfig, SFTGOTrainer
from hf_sft_variants.sft_go.loss import GroupOptimization
from hf_sft_variants.sft_go.metrics import WorstGroupFlips


def result_of(worst_groups, has_two_groups):
    weight = torch.tensor([[1.0, 1.0] if both else [1.0, 0.0] for both in has_two_groups])
    return GroupOptimization(torch.zeros(()), torch.zeros_like(weight), weight, torch.tensor(worst_groups))


def test_flips_are_counted_by_sample_in_any_row():
    flips = WorstGroupFlips()
    numbers = torch.tensor([[4, 4, -1], [5, 5, 5], [6, 6, 6]])
    rows = torch.arange(3)[:, None].expand(3, 3)
    assert flips.update(result_of([0, 1, 0], [True, True, False]), numbers, rows) == (0, 0)
    # The same samples in another order, packed into one row; the third has one group again
    packed = torch.tensor([[6, 6, 6, -1, 5, 5, 5, -1, 4, 4]])
    samples = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]])
    assert flips.update(result_of([0, 0, 0], [False, True, True]), packed, samples) == (1, 2)
    assert flips.update(result_of([0, 1, 0], [False, True, True]), packed, samples) == (1, 2)


def test_flip_rate_is_logged_from_the_second_epoch_on(tiny_model, tokenizer, token_rows, tmp_path):
    trainer = make_trainer(
        SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, token_rows, tmp_path, num_train_epochs=3, learning_rate=0.1,
        per_device_train_batch_size=16, save_strategy="no", worst_group_weight=1.0, min_grouped_tokens=2,
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert ["sft_go/flip_rate" in log for log in logs] == [False, True, True]
    # Training on the worst group alone, with long steps, makes the other one the worst of some sample
    assert 0 < logs[1]["sft_go/flip_rate"] <= 1
    trainer.train()  # once more: it knows nothing of the run before
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert ["sft_go/flip_rate" in log for log in logs] == [False, True, True]
