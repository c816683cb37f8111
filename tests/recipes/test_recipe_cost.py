"""Estimates of `recipes/cost.py`: the models' sizes are right, the memory suffices, the tables are up to date."""

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    monkeypatch.delitem(sys.modules, "cost", raising=False)
    import cost

    return cost


@pytest.mark.parametrize("name", ["mistralai/Mistral-7B-v0.1", "meta-llama/Llama-3.2-3B"])  # the second's head is tied
def test_sizes_are_those_of_the_model(cost, name):
    sizes = cost.MODELS[name]
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_hidden_layers=2,
        num_attention_heads=sizes.hidden // 128,
        num_key_value_heads=sizes.kv // 128,
        vocab_size=sizes.vocab,
        tie_word_embeddings=sizes.tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        two_layers = sizes._replace(layers=2)
        assert model.num_parameters() == pytest.approx(two_layers.parameters, rel=1e-4)  # without the norms
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert adapted.get_nb_trainable_parameters()[0] == two_layers.adapter(8)


def bytes_kept(layers: int, adapted: bool) -> float:
    """Bytes that a bfloat16 model keeps per token for the backward pass."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    base_model = model = LlamaForCausalLM(config).to(torch.bfloat16)
    if adapted:
        lora = LoraConfig(r=1, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base_model, lora).train()
        base_model.enable_input_require_grads()
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        _ = base_model.model(torch.zeros(1, 64, dtype=torch.long), use_cache=False).last_hidden_state
    return sum(storage.nbytes() for storage in kept.values()) / 64


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_layer_keeps_as_many_bytes(cost, kind):
    hidden, mlp, kv = cost.LAYER_BYTES[kind]
    kept = bytes_kept(3, kind == "lora") - bytes_kept(2, kind == "lora")
    assert kept == pytest.approx(256 * hidden + 768 * mlp + 128 * kv, rel=0.05)


def test_recipes_fit_the_gpus_that_they_name(cost):
    sizes = {name: cost.memory(recipe) / 2**30 for name, recipe in cost.read("[ps]*/*.yaml").items()}
    assert max(sizes.values()) < 80
    assert max(size for name, size in sizes.items() if name.endswith("_qlora.yaml")) < 22


def test_what_methods_add(cost):
    recipe = {"model_name_or_path": "meta-llama/Llama-3.1-8B", "dataset_name": "data/alpaca", "num_train_epochs": 1}
    plain = cost.flops(recipe | {"module": "hf_sft_variants.sft_go"})
    one_pass = plain / 8  # forward 2, backward 4, forward again for gradient checkpointing 2, in one pass's 2
    methods = {
        "poft": {"reference_models": ["meta-llama/Meta-Llama-3-8B-Instruct"] * 3},
        "sft_go": {"group_by": "rho1", "reference_model": "meta-llama/Llama-3.1-8B-Instruct"},
        "sftmix": {"confidence_source": "reference"},
        "sftkey": {"use_peft": True},
    }
    flops = {name: cost.flops(recipe | {"module": name} | keys) / one_pass for name, keys in methods.items()}
    assert flops == pytest.approx({"poft": 14, "sft_go": 10, "sftmix": 22, "sftkey": 6})


def test_tables_of_the_readme_are_up_to_date(cost):
    readme = cost.README.read_text()
    assert cost.filled(readme) == readme, "run: python recipes/cost.py"
    paths = {path.relative_to(RECIPES) for path in RECIPES.glob("*/*.yaml")}
    assert all(f"(./{path})" in readme for path in paths)
