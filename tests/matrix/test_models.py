"""Models of all kinds, precisions and ways to save memory: each method's loss as it is used, and its control."""

from collections import Counter
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from fixtures.small_models import FAMILIES, make_model
from losses import assert_as_used_is_the_slow_loss, assert_control_is_sft_trainer
from methods import cells, every_method
from torch._dynamo import OptimizedModule
from trl.trainer import sft_trainer


# The auxiliary loss is a mean over a micro-batch, and the slow loss assumes a single one
ONE_BATCH = {"per_device_train_batch_size": 8}
TWO_BATCHES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
PACKED = {"per_device_train_batch_size": 8, "packing": True, "max_length": 48}
# bfloat16 has eight bits of mantissa: sums over tokens are more exact than single gradients
BFLOAT16 = {"tolerance": 4e-3, "gradient_tolerance": 5e-2}
PRECISIONS = {
    "fp32 (weights in float32)": (torch.float32, {}),
    "bf16 (weights in bfloat16)": (torch.bfloat16, BFLOAT16),
}
CHECKPOINTING = {
    "gradient checkpointing, use_reentrant=True": {"use_reentrant": True},
    "gradient checkpointing, use_reentrant=False": {"use_reentrant": False},
    "gradient checkpointing, selective": {"selective": True},
    "gradient checkpointing, every_n_layers=2": {"every_n_layers": 2},
}


class AcceleratorModule:
    """Stands in for torch's module of a device, and counts the tensors that are offloaded."""

    def __init__(self):
        self.num_offloaded = 0

    @contextmanager
    def stream(self, _):
        self.num_offloaded += 1
        yield

    def current_stream(self):
        return None

    def empty_cache(self):
        pass


@every_method
@pytest.mark.parametrize("family", cells("Models", {name: name for name in FAMILIES}))
class TestFamilies:
    @pytest.mark.parametrize("layout", [ONE_BATCH, PACKED], ids=["padded", "packed"])
    def test_as_used(self, method, family, layout, tokenizer, rows, tmp_path):
        assert_as_used_is_the_slow_loss(method, make_model(family, tokenizer), tokenizer, rows, tmp_path, **layout)

    def test_control(self, method, family, tokenizer, even_rows, tmp_path):
        model = make_model(family, tokenizer)
        assert_control_is_sft_trainer(method, model, tokenizer, even_rows, tmp_path, **TWO_BATCHES)


@pytest.mark.cell("Models", "model given as a folder")
@every_method
def test_folder(method, llama, tokenizer, rows, even_rows, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = (method, str(tmp_path / "model"), None)
    assert_as_used_is_the_slow_loss(*arguments, rows, tmp_path, **TWO_BATCHES)
    assert_control_is_sft_trainer(*arguments, even_rows, tmp_path, **TWO_BATCHES)


@every_method
class TestPrecision:
    @pytest.mark.parametrize("precision", cells("Models", PRECISIONS))
    def test_weights(self, method, precision, llama, tokenizer, rows, even_rows, tmp_path):
        """In bfloat16, within 0.4 % of the loss and 5 % of the gradient of the same weights in float32."""
        dtype, tolerances = precision
        arguments = (method, llama.to(dtype), tokenizer)
        trainer = assert_as_used_is_the_slow_loss(*arguments, rows, tmp_path, **TWO_BATCHES, **tolerances)
        assert trainer.model.dtype == dtype
        assert_control_is_sft_trainer(*arguments, even_rows, tmp_path, **TWO_BATCHES)

    @pytest.mark.cell("Models", "bf16=True (autocast in bfloat16)")
    def test_autocast(self, method, llama, tokenizer, rows, even_rows, tmp_path):
        """Within 0.4 % of the loss and 5 % of the gradient in float32."""
        options = {**TWO_BATCHES, "bf16": True}
        assert_as_used_is_the_slow_loss(method, llama, tokenizer, rows, tmp_path, **options, **BFLOAT16)
        assert_control_is_sft_trainer(method, llama, tokenizer, even_rows, tmp_path, **options)


@every_method
class TestMemory:
    @pytest.mark.parametrize("kwargs", cells("Models", CHECKPOINTING))
    def test_checkpointing(self, method, kwargs, llama, tokenizer, rows, even_rows, tmp_path):
        options = {
            **TWO_BATCHES, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs,
        }  # fmt: skip
        assert_as_used_is_the_slow_loss(method, llama, tokenizer, rows, tmp_path, **options)
        forwards = Counter()
        for number, layer in enumerate(llama.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, number=number: forwards.update([number]))
        assert_control_is_sft_trainer(method, llama, tokenizer, even_rows, tmp_path, **options)
        # Of SFTTrainer and of the control two micro-batches each, computed again in the backward pass
        assert forwards == {0: 8, 1: 4 if "every_n_layers" in kwargs else 8}

    @pytest.mark.cell("Models", "activation_offloading (with the CPU as accelerator)")
    def test_activation_offloading(self, method, llama, tokenizer, rows, even_rows, tmp_path, monkeypatch):
        """TRL offloads only from accelerators, so the CPU poses as one."""
        cpu = AcceleratorModule()
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cpu"))
        monkeypatch.setattr(torch, "get_device_module", lambda _: cpu)
        manager = partial(
            sft_trainer.get_act_offloading_ctx_manager, use_streams=False, use_pin_memory=False, min_offload_size=0
        )
        monkeypatch.setattr(sft_trainer, "get_act_offloading_ctx_manager", manager)
        options = {**TWO_BATCHES, "activation_offloading": True}
        assert_as_used_is_the_slow_loss(method, llama, tokenizer, rows, tmp_path, **options)
        assert cpu.num_offloaded > 20
        assert_control_is_sft_trainer(method, llama, tokenizer, even_rows, tmp_path, **options)


@pytest.fixture
def compiled_once():
    """Makes a fallback to the uncompiled model an error."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.cell("Models", "torch_compile=True")
@every_method
def test_compiled(method, tokenizer, even_rows, tmp_path):
    model = make_model("Llama", tokenizer, num_hidden_layers=1)
    options = {**ONE_BATCH, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = assert_as_used_is_the_slow_loss(method, model, tokenizer, even_rows, tmp_path, **options)
    assert isinstance(trainer.model_wrapped, OptimizedModule)
    assert_control_is_sft_trainer(method, model, tokenizer, even_rows, tmp_path, **options)
