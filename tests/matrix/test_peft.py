"""Adapters: each method's loss as it is used, and its control, which is SFTTrainer."""

import copy
import math

import pytest
import torch
from fixtures.small_models import make_model
from helpers import make_trainer
from losses import assert_as_used_is_the_slow_loss, assert_control_is_sft_trainer
from methods import METHODS, cells, every_method
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


TWO_BATCHES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
# Adapters with random weights: a new one adds nothing, and half of it has no gradient
LORA = {"task_type": TaskType.CAUSAL_LM, "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
ADAPTERS = {
    "LoRA": LoraConfig(**LORA),
    "LoRA with a fully trained LM head": LoraConfig(
        **{**LORA, "target_modules": ["q_proj"]}, modules_to_save=["lm_head"]
    ),
    "DoRA": LoraConfig(**LORA, use_dora=True),
    "rsLoRA": LoraConfig(**LORA, use_rslora=True),
}
VIRTUAL = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": 3}
PROMPTS = {
    "prompt tuning": PromptTuningConfig(**VIRTUAL),
    "P-tuning": PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=8),
    "prefix tuning": PrefixTuningConfig(**VIRTUAL),
}


@pytest.fixture(scope="module")
def llama_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_model("Llama", tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized_llama(llama_folder):
    """In 4-bit NF4, with products in float32, which the CPU has."""
    pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=quantization)


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@every_method
@pytest.mark.parametrize("peft_config", cells("PEFT", ADAPTERS))
def test_new_adapter(method, peft_config, llama, tokenizer, rows, even_rows, tmp_path):
    options = {**TWO_BATCHES, "peft_config": peft_config}
    trainer = assert_as_used_is_the_slow_loss(method, llama, tokenizer, rows, tmp_path, **options)
    names = " ".join(trained_names(trainer.model))
    assert ("lora_magnitude_vector" in names) == peft_config.use_dora
    assert ("lm_head" in names) == bool(peft_config.modules_to_save)
    (scaling,) = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.scaling.values()
    assert scaling == (8 / math.sqrt(4) if peft_config.use_rslora else 8 / 4)
    assert_control_is_sft_trainer(method, llama, tokenizer, even_rows, tmp_path, **options)


@every_method
@pytest.mark.parametrize("peft_config", cells("PEFT", PROMPTS))
def test_virtual_tokens(method, peft_config, llama, tokenizer, rows, even_rows, tmp_path):
    """Annotations have to be aligned from the right."""
    options = {**TWO_BATCHES, "peft_config": peft_config}
    trainer = assert_as_used_is_the_slow_loss(method, llama, tokenizer, rows, tmp_path, **options)
    assert all(name.startswith("prompt_encoder") for name in trained_names(trainer.model))
    assert_control_is_sft_trainer(method, llama, tokenizer, even_rows, tmp_path, **options)


@every_method
@pytest.mark.cell("PEFT", "continued training of an adapter")
def test_adapter_continued(method, llama, llama_folder, tokenizer, rows, even_rows, tmp_path):
    """Saved, loaded again and given as a `PeftModel`."""
    adapter = get_peft_model(copy.deepcopy(llama), LoraConfig(**LORA))
    adapter.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(llama, tmp_path / "adapter", is_trainable=True)
    trainer = assert_as_used_is_the_slow_loss(method, model, tokenizer, rows, tmp_path, **TWO_BATCHES)
    assert trained_names(trainer.model) == trained_names(adapter)
    assert_control_is_sft_trainer(method, model, tokenizer, even_rows, tmp_path, **TWO_BATCHES)


@every_method
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.cell("PEFT", "LoRA with gradient checkpointing")
def test_checkpointing(method, use_reentrant, llama, tokenizer, rows, even_rows, tmp_path):
    options = {
        **TWO_BATCHES, "peft_config": LoraConfig(**LORA), "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }  # fmt: skip
    assert_as_used_is_the_slow_loss(method, llama, tokenizer, rows, tmp_path, **options)
    assert_control_is_sft_trainer(method, llama, tokenizer, even_rows, tmp_path, **options)


QUANTIZED = {
    "QLoRA (bitsandbytes, 4-bit NF4)": TWO_BATCHES,
    "QLoRA (bitsandbytes, 4-bit NF4), packed, with gradient checkpointing": {
        "packing": True, "max_length": 48, "gradient_checkpointing": True,
    },
}  # fmt: skip


@every_method
@pytest.mark.parametrize("layout", cells("PEFT", QUANTIZED))
def test_quantized(method, layout, quantized_llama, tokenizer, rows, even_rows, tmp_path):
    """TRL trains the adapter of a quantized model in bfloat16, which rounds its gradients by up to 2 %."""
    options = {**layout, "peft_config": LoraConfig(**LORA)}
    arguments = (method, quantized_llama, tokenizer)
    trainer = assert_as_used_is_the_slow_loss(*arguments, rows, tmp_path, gradient_tolerance=2e-2, **options)
    weight = trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.dtype == torch.uint8 and weight.quant_state.quant_type == "nf4"
    assert_control_is_sft_trainer(*arguments, even_rows, tmp_path, gradient_tolerance=1e-2, **options)


@every_method
@pytest.mark.parametrize("layout", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=str)
@pytest.mark.cell("PEFT", "virtual tokens, packed or padding-free", refused=True)
def test_packed_prompts(method, layout, llama, tokenizer, rows, tmp_path, monkeypatch):
    """PEFT drops the positions that separate the documents of a packed row. Refused before the data is prepared."""
    monkeypatch.setattr(METHODS[method].trainer_class, "_prepare_dataset", None)
    options = {**METHODS[method].options, **layout, "peft_config": PROMPTS["prompt tuning"]}
    with pytest.raises(ValueError, match="`PROMPT_TUNING` does not keep the documents of a packed row apart"):
        make_trainer(*METHODS[method].classes, llama, tokenizer, rows, tmp_path, **options)
