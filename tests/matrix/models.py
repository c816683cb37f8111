"""Small models of the families in use, from configurations."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    set_seed,
)


TOKENS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2, "initializer_range": 0.2}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZES, **TOKENS, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

FAMILIES: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**GROUPED),
    "Qwen2": Qwen2Config(**SIZES, **TOKENS, num_key_value_heads=2),
    "Qwen3": Qwen3Config(**GROUPED),
    # A cap that bends the logits
    "Gemma2 (soft-capped logits)": Gemma2Config(
        **GROUPED, final_logit_softcapping=3.0, attn_logit_softcapping=5.0, query_pre_attn_scalar=8, sliding_window=8
    ),
    "Cohere2 (scaled logits)": Cohere2Config(**GROUPED, logit_scale=0.25, sliding_window=8),
    "GPT-2 (tied head without a bias)": GPT2Config(n_embd=32, n_layer=2, n_head=4, **NO_DROPOUT, **TOKENS),
    "Phi (head with a bias)": PhiConfig(**SIZES, **TOKENS),
    "Qwen3-MoE (auxiliary loss)": Qwen3MoeConfig(
        **GROUPED, **EXPERTS, output_router_logits=True, router_aux_loss_coef=0.5
    ),
}


def make_model(family: str, tokenizer, **options) -> PreTrainedModel:
    """A model with the same random weights each time, biases and norms too; `options` go to the configuration."""
    set_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    config.update({"vocab_size": len(tokenizer), **options})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
