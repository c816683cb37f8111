"""Models with the LM head against their own logits, under adapters and sharding."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import Operations
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer import add_fused_lm_head

from hf_sft_variants.errors import InputError
from hf_sft_variants.lm_head.forward import add_lm_head, head_settings


SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
GPT2 = {"n_embd": 16, "n_head": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
MODELS = {
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_untied": ("llama", {"tie_word_embeddings": False}),
    "gemma2_soft_cap": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "recurrent_gemma_soft_cap": ("recurrent_gemma", {"logits_soft_cap": 2.0, "num_hidden_layers": 3}),
    "cohere2_scale": ("cohere2", {"logit_scale": 0.25}),
    "granite_divisor": ("granite", {"logits_scaling": 4.0}),
    "phi_bias": ("phi", {"num_key_value_heads": 2}),
    "gpt2": ("gpt2", GPT2),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, **EXPERTS}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "output_router_logits": True}),
}
# Row and column of `labels[:, 1:]`; the columns of the second rows are others
PAIRS = [((0, 2), (1, 4)), ((0, 3), (1, 5)), ((2, 0), (3, 1)), ((0, 8), (3, 7))]
SHARES = [0.3, 0.3, 0.9, 0.05]


def make_model(name="llama_untied"):
    torch.manual_seed(0)
    family, options = MODELS[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | options))
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model


def make_inputs():
    """Four rows of ten tokens, one of them padded; some labels left out, none of a pair's."""
    input_ids = torch.randint(3, 61, (4, 10), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 8:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, :3] = -100
    labels[2, 4:6] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def mixup(pairs=PAIRS):
    """The keyword arguments for the pairs."""
    positions = torch.tensor(pairs)
    positions[:, :, 1] -= 9
    return {"mixup_first": positions[:, 0], "mixup_second": positions[:, 1], "mixup_weights": SHARES}


def scored(model, **options):
    return model(**make_inputs(), **{**mixup(), **options}, score_labels=True)


def loss_of(log_probs, mixed_log_probs):
    return -log_probs.sum() / 20 - 0.2 * mixed_log_probs.sum() / 4


def dense_scores(model):
    """Of the labels from the model's own logits; of the mixtures from its head, too, given mixed hidden states."""
    inputs = make_inputs()
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs).logits[:, :-1]
    log_p = logits.log_softmax(-1)
    log_probs = log_p.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels != -100)
    entropy = -(log_p.exp() * log_p).sum(-1) * (labels != -100)

    (rows_c, columns_c), (rows_u, columns_u) = torch.tensor(PAIRS).permute(1, 2, 0)
    share = torch.tensor(SHARES)

    def mix(module, args, output):
        z = output.last_hidden_state
        z = share[:, None] * z[rows_c, columns_c] + (1 - share[:, None]) * z[rows_u, columns_u]
        output.last_hidden_state = z[None]
        return output

    hook = model.base_model.register_forward_hook(mix)
    mixed_log_p = model(**inputs, **without_router_logits(model)).logits[0].log_softmax(-1)
    hook.remove()
    pair = torch.arange(len(PAIRS))
    first, second = mixed_log_p[pair, labels[rows_c, columns_c]], mixed_log_p[pair, labels[rows_u, columns_u]]
    return log_probs, entropy, logits.argmax(-1) == labels, share * first + (1 - share) * second


def without_router_logits(model):
    return {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}


def gradients_of(model, loss):
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, named.values(), allow_unused=True), strict=True))


def assert_same_gradients(gradients, expected):
    assert gradients.keys() == expected.keys()
    error, norm = (
        torch.cat([values.flatten() for values in vectors]).norm()
        for vectors in (
            [gradients[name] - expected[name] for name in expected if expected[name] is not None],
            [values for values in expected.values() if values is not None],
        )
    )
    assert norm > 0 and error < 2e-6 * norm


@pytest.mark.parametrize("name", MODELS)
def test_like_the_models_own_logits(name):
    model = make_model(name)
    log_probs, entropy, is_top1, mixed_log_probs = dense_scores(model)
    expected = gradients_of(model, loss_of(log_probs, mixed_log_probs))
    aux_loss = model(**make_inputs()).get("aux_loss")
    add_lm_head(model)
    outputs = scored(model)
    mask = make_inputs()["labels"][:, 1:] != -100
    assert torch.equal(outputs.label_mask, mask) and torch.equal(outputs.is_top1, is_top1 & mask)
    torch.testing.assert_close(outputs.log_probs, log_probs, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(outputs.entropy, entropy, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(outputs.mixed_log_probs, mixed_log_probs, rtol=1e-5, atol=5e-6)
    assert_same_gradients(gradients_of(model, loss_of(outputs.log_probs, outputs.mixed_log_probs)), expected)
    assert ("aux_loss" in outputs) == (aux_loss is not None)
    if aux_loss is not None:
        torch.testing.assert_close(outputs.aux_loss, aux_loss)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, (None, 1.0)),
        ({"logit_scale": None, "output_multiplier": 0.5}, (None, 0.5)),
        ({"lm_head_multiplier": 0.25}, (None, 0.25)),
        ({"logits_scaling": 8.0, "model_type": "granite"}, (None, 0.125)),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, (None, 8.0)),
        ({"output_logit_soft_cap": 30.0}, (30.0, 1.0)),
    ],
)
def test_settings_of_other_families(settings, expected):
    assert tuple(head_settings(SimpleNamespace(**settings)).values()) == expected


def test_without_it_the_forward_before():
    model = make_model("llama_tied")
    original = copy.deepcopy(model)
    add_fused_lm_head(model)
    expected = model(**make_inputs(), fused_lm_head=True).log_probs
    add_lm_head(model)
    assert inspect.signature(model.forward) == inspect.signature(original.forward)
    inputs = make_inputs()
    assert torch.equal(model(**inputs).loss, original(**inputs).loss)
    assert torch.equal(model(**inputs, fused_lm_head=True).log_probs, expected)
    generated = [m.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False) for m in (model, original)]
    assert torch.equal(*generated)


def test_copied_model_uses_its_own_weights():
    model = make_model("llama_tied")
    add_lm_head(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(2)
    assert not torch.allclose(scored(model).log_probs, scored(copied).log_probs)


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_lora(modules_to_save):
    torch.manual_seed(0)
    config = LoraConfig(init_lora_weights=False, target_modules=["q_proj"], modules_to_save=modules_to_save)
    model = get_peft_model(make_model(), config)
    log_probs, *_, mixed_log_probs = dense_scores(model.get_base_model())
    expected = gradients_of(model, loss_of(log_probs, mixed_log_probs))
    add_lm_head(model.get_base_model())
    outputs = scored(model)
    torch.testing.assert_close(outputs.mixed_log_probs, mixed_log_probs, rtol=1e-5, atol=5e-6)
    with Operations() as operations:
        gradients = gradients_of(model, loss_of(outputs.log_probs, outputs.mixed_log_probs))
    assert_same_gradients(gradients, expected)
    # The forward pass has made all there is to make with a frozen head
    num_labels = outputs.label_mask.sum().item()
    of_tiles = {num_rows * 61 * 16 for num_rows in (8, num_labels - 8)}
    products = sum(product for product in operations.products if product in of_tiles)
    assert products == (2 if modules_to_save else 0) * num_labels * 61 * 16


def test_a_head_that_is_more_than_its_weight():
    model = get_peft_model(make_model(), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(InputError, match="LM head of LlamaForCausalLM has an adapter.*Remove it from the adapter"):
        add_lm_head(model.get_base_model())
    model = make_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="or from what is quantized"):
        add_lm_head(model)


def test_prompt_learning_moves_no_position():
    torch.manual_seed(0)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(make_model(), config)
    add_lm_head(model.get_base_model())
    # The first token, too, is predicted here: by a virtual token. It is column -1 of the plain grid.
    pairs = [((2, -1), (3, -1)), *PAIRS[:3]]
    outputs = scored(model, **mixup(pairs))
    assert outputs.label_mask.shape == (4, 12)
    logits = model(**{key: value for key, value in make_inputs().items() if key != "labels"}).logits[:, 2:-1]
    labels = make_inputs()["labels"]
    for share, ((row_c, column_c), (row_u, column_u)), mixed in zip(
        SHARES, pairs, outputs.mixed_log_probs, strict=True
    ):
        log_p = (share * logits[row_c, column_c + 1] + (1 - share) * logits[row_u, column_u + 1]).log_softmax(-1)
        expected = share * log_p[labels[row_c, column_c + 1]] + (1 - share) * log_p[labels[row_u, column_u + 1]]
        torch.testing.assert_close(mixed, expected)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("error:FSDP2-wrapped module.*returned a view tensor")
@pytest.mark.parametrize("frozen", [False, True])
def test_sharded_head(mesh, frozen):
    model = make_model()
    model.lm_head.requires_grad_(not frozen)
    add_lm_head(model)
    expected = scored(model)
    gradients = gradients_of(model, loss_of(expected.log_probs, expected.mixed_log_probs))
    fully_shard(model.lm_head, mesh=mesh)  # a group of its own: its weight stays sharded in the model's forward
    fully_shard(model, mesh=mesh)
    outputs = scored(model)
    torch.testing.assert_close(outputs.mixed_log_probs, expected.mixed_log_probs)
    loss_of(outputs.log_probs, outputs.mixed_log_probs).backward()
    assert isinstance(model.lm_head.weight, DTensor)
    sharded = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    assert_same_gradients(sharded, gradients)


def test_mixed_precision_casts_tensors_but_not_lists(mesh):
    """Why the weights may be a list: FSDP rounds a tensor of λ to bfloat16."""
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, inputs, weights):
            seen.append(torch.as_tensor(weights, dtype=torch.float32))
            return super().forward(inputs)

    model = fully_shard(Model(2, 2), mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    for weights in (torch.tensor(SHARES), SHARES):
        model(torch.zeros(1, 2), weights=weights)
    assert not torch.equal(seen[0], torch.tensor(SHARES)) and torch.equal(seen[1], torch.tensor(SHARES))
