"""Each method's control run is `SFTTrainer`'s: the weights after twenty steps, and what is logged on the way."""

import pytest
import torch
from helpers import make_trainer
from methods import METHODS, SFT, every_method
from peft import LoraConfig


LAYOUTS = {
    "padded": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "padding_free": {"per_device_train_batch_size": 4, "padding_free": True, "max_length": None},
    "bfd": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "packing": True},
    "lora": {"per_device_train_batch_size": 4},
}


def run(classes, layout, model, tokenizer, rows, folder, **options):
    if layout == "lora":
        options["peft_config"] = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    # With SGD: Adam makes steps of full size of gradients that are rounding errors
    options = {
        "max_steps": 20,
        "optim": "sgd",
        "learning_rate": 0.3,
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        **options,
    }
    trainer = make_trainer(*classes, model, tokenizer, rows, folder, **LAYOUTS[layout], **options)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain_runs():
    """`SFTTrainer`'s runs by layout and rows, filled on demand."""
    return {}


@pytest.mark.cell("Control", "same weights as SFTTrainer after twenty steps of the control")
@pytest.mark.parametrize("layout", LAYOUTS)
@every_method
def test_twenty_steps(method, layout, plain_runs, tiny_model, tokenizer, token_rows, equal_rows, tmp_path):
    control = METHODS[method]
    rows = equal_rows if method == "poft" else token_rows
    common = (layout, tiny_model, tokenizer, rows, tmp_path)
    key = layout, rows is equal_rows
    if key not in plain_runs:
        plain_runs[key] = run(SFT, *common)
    plain, ours = plain_runs[key], run(control.classes, *common, **control.control)
    weights, our_weights = plain.model.state_dict(), ours.model.state_dict()
    assert weights.keys() == our_weights.keys()
    for name in weights:
        torch.testing.assert_close(our_weights[name], weights[name], rtol=0, atol=1e-6, msg=name)
    logs, our_logs = plain.state.log_history[:-1], ours.state.log_history[:-1]
    assert len(logs) == 20 and logs[0]["loss"] > logs[-1]["loss"]
    for log, our_log in zip(logs, our_logs, strict=True):
        assert {name: our_log[name] for name in log} == pytest.approx(log, rel=1e-5, abs=0)
        own_names = our_log.keys() - log.keys() - {"nll"}
        assert all(name.startswith(f"{method}/") for name in own_names)
