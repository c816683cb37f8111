"""The paired LM head against dense logits in double precision, against TRL's head, and what it may cost."""

import copy
import inspect

import pytest
import torch
import torch.distributed as dist
from helpers import Operations
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl.kernels import ChunkedLogProbFunction

from hf_sft_variants.base.trl_internals import add_fused_lm_head
from hf_sft_variants.lm_head.paired_lm_head import add_paired_lm_head, paired_log_probs


OUTPUTS = ("log_probs", "entropy", "is_top1")


# The function alone


def make_case(
    num_rows=11, num_pairs=4, vocab=13, hidden=5, dtype=torch.float64, bias=False, ignored=1, seed=0, **head
):
    """Arguments of `paired_log_probs` with random numbers, pairs in any order, some rows without a label."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(vocab, (num_rows,), generator=generator)
    rows = torch.randperm(num_rows, generator=generator)
    labels[rows[num_rows - ignored :]] = -100
    return {
        "hidden_states": random(num_rows, hidden).requires_grad_(),
        "weight": random(vocab, hidden).requires_grad_(),
        "bias": random(vocab).requires_grad_() if bias else None,
        "labels": labels,
        "first": rows[:num_pairs],
        "second": rows[num_pairs : 2 * num_pairs],
        "mix_weights": torch.rand(num_pairs, generator=generator),
        **head,
    }


def dense_head(hidden_states, weight, bias, final_logit_softcapping=None, logit_scale=1.0):
    logits = hidden_states.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * logit_scale
    if final_logit_softcapping is not None:
        logits = final_logit_softcapping * torch.tanh(logits / final_logit_softcapping)
    return logits


def dense_log_probs(hidden_states, weight, bias, labels, first, second, mix_weights, **head):
    """The definition: mix hidden states, apply the head, cross-entropy against the mixed one-hot labels."""
    head = {name: value for name, value in head.items() if not name.startswith("tile")}
    is_labelled = labels != -100
    logits = dense_head(hidden_states, weight, bias, **head)
    log_p = logits.log_softmax(-1)
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), len(weight)).double()
    share = mix_weights.double()[:, None]
    mixed_hidden_states = share * hidden_states[first].double() + (1 - share) * hidden_states[second].double()
    mixed_labels = share * one_hot[first] + (1 - share) * one_hot[second]
    mixed_log_p = dense_head(mixed_hidden_states, weight, bias, **head).log_softmax(-1)
    return (
        (one_hot * log_p).sum(-1) * is_labelled,
        -(log_p.exp() * log_p).sum(-1) * is_labelled,
        (logits.argmax(-1) == labels) & is_labelled,
        (mixed_labels * mixed_log_p).sum(-1),
    )


def gradients_of(function, case, upstream):
    """Outputs, and gradients of hidden states, weight and bias for given gradients on the outputs (`None`: unused)."""
    outputs = function(**case)
    inputs = [case[name] for name in ("hidden_states", "weight", "bias") if case[name] is not None]
    inputs = [tensor for tensor in inputs if tensor.requires_grad]
    used = [(output, g.to(output.dtype)) for output, g in zip(outputs, upstream, strict=True) if g is not None]
    return outputs, torch.autograd.grad([output for output, _ in used], inputs, [g for _, g in used])


def random_upstream(case, seed=0):
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_pairs = len(case["labels"]), len(case["first"])
    sizes = (num_rows, None, None, num_pairs)
    return [None if size is None else torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def assert_like_dense(case, upstream, rtol, atol):
    outputs, gradients = gradients_of(paired_log_probs, case, upstream)
    expected, expected_gradients = gradients_of(dense_log_probs, case, upstream)
    expected = [reference.to(output.dtype) for output, reference in zip(outputs, expected, strict=True)]
    for output, reference in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        torch.testing.assert_close(output, reference, rtol=rtol, atol=atol)


@st.composite
def cases(draw):
    num_rows = draw(st.integers(2, 12))
    num_pairs = draw(st.integers(0, num_rows // 2))
    return make_case(
        num_rows,
        num_pairs,
        vocab=draw(st.integers(2, 17)),
        hidden=draw(st.integers(1, 6)),
        bias=draw(st.booleans()),
        ignored=draw(st.integers(0, num_rows - 2 * num_pairs)),
        seed=draw(st.integers(0, 99)),
        final_logit_softcapping=draw(st.sampled_from([None, 2.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.3])),
        tile_rows=draw(st.sampled_from([1, 2, 4, 5, 64])),
        tile_vocab=draw(st.sampled_from([1, 3, 8, 64])),
    )


@given(case=cases(), used=st.sets(st.sampled_from([0, 3]), min_size=1), frozen=st.booleans())
@settings(max_examples=200, deadline=None)
def test_like_dense_soft_label_cross_entropy(case, used, frozen):
    if frozen:
        freeze(case)
    upstream = [g if index in used else None for index, g in enumerate(random_upstream(case))]
    assert_like_dense(case, upstream, rtol=1e-9, atol=1e-9)


def freeze(case):
    for name in ("weight", "bias"):
        if case[name] is not None:
            case[name].requires_grad_(False)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("head", [{}, {"final_logit_softcapping": 2.0, "logit_scale": 0.3, "bias": True}])
def test_gradcheck(head, frozen):
    case = make_case(num_rows=7, num_pairs=2, vocab=6, hidden=3, tile_rows=2, tile_vocab=4, **head)
    if frozen:
        freeze(case)
    inputs = [case.pop("hidden_states"), case.pop("weight")] + [case.pop("bias")] * bool(head)

    def differentiable(hidden_states, weight, bias=None):
        outputs = paired_log_probs(hidden_states, weight, bias, **case)
        return outputs[0], outputs[3]

    assert torch.autograd.gradcheck(differentiable, inputs)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("probability", [0.9, 0.999, 0.99999])
def test_gradient_where_the_model_is_sure(probability, frozen):
    """It is in proportion to 1 - p, which would cancel if p came first: as exact in float32 as anywhere else."""
    vocab, hidden_size = 50, 8
    case = make_case(20, 6, vocab, hidden_size, dtype=torch.float32, ignored=0, tile_rows=8, tile_vocab=16)
    with torch.no_grad():
        case["weight"][:] = torch.randn(vocab, hidden_size, generator=torch.Generator().manual_seed(1))
        for row, label in enumerate(case["labels"].tolist()):
            others = torch.arange(vocab) != label
            direction = torch.linalg.lstsq(
                case["weight"], torch.nn.functional.one_hot(torch.tensor(label), vocab).float()
            )
            low, high = 0.0, 400.0
            for _ in range(60):  # the length for which the label has the probability
                middle = (low + high) / 2
                p = (case["weight"].double() @ direction.solution.double() * middle).softmax(0)[label]
                low, high = (middle, high) if p < probability else (low, middle)
            case["hidden_states"][row] = direction.solution * low
            assert others.any()
    if frozen:
        freeze(case)
    upstream = [torch.ones(20), None, None, None]
    _, gradients = gradients_of(paired_log_probs, case, upstream)
    _, expected = gradients_of(dense_log_probs, double(case), upstream)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert (gradient - reference).norm() < 3e-5 * reference.norm()


def double(case):
    """The same case in float64, rounded nowhere."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if torch.is_tensor(value) and value.is_floating_point()
        else value
        for name, value in case.items()
    }


def test_float32():
    case = make_case(200, 70, 300, 16, dtype=torch.float32, ignored=20, tile_rows=32, tile_vocab=64, bias=True)
    assert_like_dense(case, random_upstream(case), rtol=1e-4, atol=2e-4)


def test_bfloat16_is_rounded_in_the_products_only():
    case = make_case(40, 15, 50, 8, dtype=torch.bfloat16, tile_rows=8, tile_vocab=16)
    outputs, gradients = gradients_of(paired_log_probs, case, random_upstream(case))
    expected, expected_gradients = gradients_of(dense_log_probs, case, random_upstream(case))
    assert outputs[0].dtype == outputs[1].dtype == outputs[3].dtype == torch.float32
    torch.testing.assert_close(outputs[3].double(), expected[3], rtol=0.01, atol=0.03)
    for output, reference in zip(gradients, expected_gradients, strict=True):
        assert output.dtype == torch.bfloat16
        assert (output.double() - reference).norm() < 0.01 * reference.norm()


def test_autocast_as_in_trl():
    case = make_case(20, 8, 30, 8, dtype=torch.float32, ignored=0)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, entropy, is_top1, mixed_log_probs = paired_log_probs(**case)
        expected = ChunkedLogProbFunction.apply(
            case["hidden_states"], case["weight"], None, case["labels"], 1.0, 64, None, 1.0, OUTPUTS
        )
    torch.testing.assert_close(log_probs, expected[0])
    torch.testing.assert_close(entropy, expected[1])
    assert torch.equal(is_top1, expected[4])
    mixed_log_probs.sum().backward()
    assert case["weight"].grad.dtype == torch.float32


def test_share_one_is_the_first_row_alone():
    case = make_case(num_pairs=5)
    case["mix_weights"] = torch.ones(5)
    log_probs, _, _, mixed_log_probs = paired_log_probs(**case)
    torch.testing.assert_close(mixed_log_probs, log_probs[case["first"]])
    case["mix_weights"] = torch.zeros(5)
    log_probs, _, _, mixed_log_probs = paired_log_probs(**case)
    torch.testing.assert_close(mixed_log_probs, log_probs[case["second"]])


def test_share_does_not_matter_for_identical_rows():
    case = make_case(num_pairs=3)
    with torch.no_grad():
        case["hidden_states"][case["second"]] = case["hidden_states"][case["first"]]
    case["labels"][case["second"]] = case["labels"][case["first"]]
    log_probs, _, _, mixed_log_probs = paired_log_probs(**case)
    torch.testing.assert_close(mixed_log_probs, log_probs[case["first"]])


def test_gradient_reaches_both_rows_and_no_other():
    case = make_case(num_pairs=2)
    paired_log_probs(**case)[3].sum().backward()
    reached = case["hidden_states"].grad.abs().sum(1) > 0
    assert reached.nonzero().flatten().tolist() == sorted([*case["first"].tolist(), *case["second"].tolist()])


def test_of_equal_logits_the_first_counts_as_in_trl():
    hidden_states, weight = torch.ones(6, 1), torch.tensor([[0.0], [2.0], [1.0], [2.0], [2.0]])
    labels, none = torch.tensor([0, 1, 2, 3, 4, 1]), torch.empty(0, dtype=torch.long)
    for tile_vocab in (1, 2, 5):
        is_top1 = paired_log_probs(
            hidden_states, weight, None, labels, none, none, torch.empty(0), None, 1.0, 4, tile_vocab
        )[2]
        expected = ChunkedLogProbFunction.apply(hidden_states, weight, None, labels, 1.0, 2, None, 1.0, OUTPUTS)[4]
        assert is_top1.tolist() == expected.tolist() == [False, True, False, False, False, True]


def test_no_label_gives_differentiable_zeros():
    case = make_case(num_rows=5, num_pairs=0, ignored=5)
    log_probs, entropy, is_top1, mixed_log_probs = paired_log_probs(**case)
    assert not log_probs.any() and not entropy.any() and not is_top1.any() and len(mixed_log_probs) == 0
    (log_probs.sum() + mixed_log_probs.sum()).backward()
    assert torch.equal(case["hidden_states"].grad, torch.zeros(5, 5, dtype=torch.float64))
    assert torch.equal(case["weight"].grad, torch.zeros(13, 5, dtype=torch.float64))


def test_pairs_that_can_not_be():
    case = make_case()
    unlabelled = (case["labels"] == -100).nonzero()[0]
    for name, row in (("first", unlabelled), ("first", case["first"][1]), ("second", case["first"][1])):
        positions = case[name].clone()
        positions[0] = row
        with pytest.raises(ValueError, match="no label, or is in two pairs"):
            paired_log_probs(**{**case, name: positions})
    with pytest.raises(ValueError, match="Of 4 pairs 4 second rows and 1 weights"):
        paired_log_probs(**{**case, "mix_weights": torch.ones(1)})


# What it costs


def operations_of(function, **case):
    with Operations() as operations:
        outputs = function(**case)
        sum(output.sum() for output in outputs if output is not None and output.requires_grad).backward()
    return operations


def trl_log_probs(hidden_states, weight, bias, labels, **_):
    return ChunkedLogProbFunction.apply(hidden_states, weight, bias, labels, 1.0, 64, None, 1.0, OUTPUTS)


@pytest.mark.parametrize("tiles", [{}, {"tile_rows": 8, "tile_vocab": 16}])
def test_no_product_more_than_trl(tiles):
    case = make_case(num_rows=40, num_pairs=20, vocab=50, dtype=torch.float32, ignored=0)
    expected = operations_of(trl_log_probs, **case).products
    products = operations_of(paired_log_probs, **case, **tiles).products
    assert len(expected) == 4  # forward, again in the backward pass, and the gradients of hidden states and weight
    assert sum(products) == sum(expected) == 4 * 40 * 50 * 5
    if not tiles:
        assert products == expected


@pytest.mark.parametrize("num_pairs, products", [(0, 2), (20, 2.5), (10, 2.25)])
def test_a_frozen_head_takes_two_products_and_half_of_one_for_mixtures(num_pairs, products):
    case = make_case(num_rows=40, num_pairs=num_pairs, vocab=50, dtype=torch.float32, ignored=0, bias=True)
    freeze(case)
    assert sum(operations_of(paired_log_probs, **case).products) == products * 40 * 50 * 5
    assert case["weight"].grad is case["bias"].grad is None
    assert sum(operations_of(trl_log_probs, **case).products) == 3 * 40 * 50 * 5


def test_frozen_hidden_states_save_their_product():
    case = make_case(num_rows=40, num_pairs=20, vocab=50, ignored=0)
    case["hidden_states"].requires_grad_(False)
    assert len(operations_of(paired_log_probs, **case).products) == 3
    assert case["hidden_states"].grad is None


def test_without_a_gradient_one_product():
    case = make_case(num_rows=40, num_pairs=20, vocab=50, ignored=0)
    with torch.no_grad(), Operations() as operations:
        paired_log_probs(**case)
    assert operations.products == [40 * 50 * 5]


def test_logits_exist_one_tile_at_a_time():
    case = make_case(num_rows=64, num_pairs=30, vocab=300, hidden=4, bias=True, dtype=torch.float32)
    operations = operations_of(
        paired_log_probs, **case, tile_rows=20, tile_vocab=50, final_logit_softcapping=2.0, logit_scale=0.5
    )
    assert operations.largest == 300 * 4  # the weight's gradient; a tile has 20 × 50, all logits would have 64 × 300


# Models

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
MODELS = {
    "llama_tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama_untied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    "gemma2_soft_cap": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "cohere2_logit_scale": (Cohere2ForCausalLM, Cohere2Config, {"logit_scale": 0.25}),
    "granite_logits_scaling": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
    "phi_bias": (PhiForCausalLM, PhiConfig, {"num_key_value_heads": 2}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "output_router_logits": True,
        },
    ),
}
# Row and column of `labels[:, 1:]`; the columns of the second rows are others
PAIRS = [((0, 2), (1, 4)), ((0, 3), (1, 5)), ((2, 0), (3, 1)), ((0, 8), (3, 7))]
SHARES = [0.3, 0.3, 0.9, 0.05]


def make_model(name):
    torch.manual_seed(0)
    model_class, config_class, options = MODELS[name]
    if name == "gpt2":
        options = {
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "vocab_size": 61,
            "initializer_range": 0.3,
        }
        options |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return model_class(config_class(**options))
    model = model_class(config_class(**{**SMALL, **options}))
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model


def add_heads(model):
    add_fused_lm_head(model, outputs=OUTPUTS)
    add_paired_lm_head(model)


def make_inputs():
    """Four rows of ten tokens, one of them padded; some labels left out, none of a pair's."""
    input_ids = torch.randint(3, 61, (4, 10), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 8:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, :3] = -100
    labels[2, 4:6] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def mixup(num_columns=9, pairs=PAIRS):
    """The keyword arguments for the pairs."""
    positions = torch.tensor(pairs)
    positions[:, :, 1] -= num_columns
    return {"mixup_first": positions[:, 0], "mixup_second": positions[:, 1], "mixup_weights": torch.tensor(SHARES)}


def scalar_loss(log_probs, mixed_log_probs):
    return -log_probs.sum() / 20 - 0.2 * mixed_log_probs.sum() / 4


def dense_model_log_probs(model, inputs):
    """From the model's own logits; those of the mixtures by its own head, too, given mixed hidden states."""
    labels = inputs["labels"][:, 1:]
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    log_p = model(**inputs).logits[:, :-1].log_softmax(-1)
    log_probs = log_p.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels != -100)

    (rows_c, columns_c), (rows_u, columns_u) = torch.tensor(PAIRS).permute(1, 2, 0)
    share = torch.tensor(SHARES)

    def mix(module, args, output):
        z = output.last_hidden_state
        z = share[:, None] * z[rows_c, columns_c] + (1 - share[:, None]) * z[rows_u, columns_u]
        output.last_hidden_state = z[None]
        return output

    hook = model.base_model.register_forward_hook(mix)
    mixed_log_p = model(**inputs).logits[0].log_softmax(-1)
    hook.remove()
    pair = torch.arange(len(PAIRS))
    first, second = mixed_log_p[pair, labels[rows_c, columns_c]], mixed_log_p[pair, labels[rows_u, columns_u]]
    return log_probs, share * first + (1 - share) * second


def parameter_gradients(model, loss):
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    return {name: gradient for (name, _), gradient in zip(named, gradients, strict=True)}


def assert_close_gradients(gradients, expected):
    assert gradients.keys() == expected.keys() and any(gradient is not None for gradient in expected.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_like_the_models_own_logits(name):
    model = make_model(name)
    log_probs, mixed_log_probs = dense_model_log_probs(model, make_inputs())
    expected = parameter_gradients(model, scalar_loss(log_probs, mixed_log_probs))
    add_heads(model)
    outputs = model(**make_inputs(), fused_lm_head=True, **mixup())
    torch.testing.assert_close(outputs.log_probs, log_probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.mixed_log_probs, mixed_log_probs, rtol=1e-4, atol=1e-5)
    assert_close_gradients(
        parameter_gradients(model, scalar_loss(outputs.log_probs, outputs.mixed_log_probs)), expected
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_items_in_batch", [None, 50])
def test_other_outputs_are_those_of_trl(name, num_items_in_batch):
    model = make_model(name)
    add_heads(model)
    inputs = {**make_inputs(), "fused_lm_head": True, "num_items_in_batch": num_items_in_batch}
    expected, outputs = model(**inputs), model(**inputs, **mixup())
    assert expected.keys() | {"mixed_log_probs"} == outputs.keys()
    for field in expected:
        torch.testing.assert_close(outputs[field], expected[field])
    assert ("aux_loss" in outputs) == (name == "qwen3_moe")
    assert_close_gradients(parameter_gradients(model, outputs.loss), parameter_gradients(model, expected.loss))


@pytest.mark.parametrize("name", ["llama_tied", "gemma2_soft_cap", "qwen3_moe"])
def test_without_pairs_equal_to_trl_to_the_last_bit(name):
    model = make_model(name)
    add_fused_lm_head(model, outputs=OUTPUTS)
    expected = model(**make_inputs(), fused_lm_head=True)
    expected_gradients = parameter_gradients(model, expected.loss)
    add_paired_lm_head(model)
    no_pairs = {"mixup_first": torch.empty(0, 2).long(), "mixup_second": torch.empty(0, 2).long(), "mixup_weights": []}
    for pairs in ({}, no_pairs):
        outputs = model(**make_inputs(), fused_lm_head=True, **pairs)
        for field in expected:
            assert torch.equal(outputs[field], expected[field]), field
        gradients = parameter_gradients(model, outputs.loss)
        for parameter, gradient in gradients.items():
            assert torch.equal(gradient, expected_gradients[parameter]), parameter
    mixed_log_probs = model(**make_inputs(), fused_lm_head=True, **no_pairs).mixed_log_probs
    assert mixed_log_probs.shape == (0,)
    assert not any(gradient.any() for gradient in parameter_gradients(model, mixed_log_probs.sum()).values())


def test_without_fused_head_the_models_own():
    model = make_model("llama_tied")
    original = copy.deepcopy(model)
    add_heads(model)
    assert inspect.signature(model.forward) == inspect.signature(original.forward)
    inputs = make_inputs()
    assert torch.equal(model(**inputs, **mixup()).logits, original(**inputs).logits)
    generated = [m.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False) for m in (model, original)]
    assert torch.equal(*generated)


def test_copied_model_uses_its_own_weights():
    model = make_model("llama_tied")
    add_heads(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(2)
    for pairs in ({}, mixup()):
        log_probs = [m(**make_inputs(), fused_lm_head=True, **pairs).log_probs for m in (model, copied)]
        assert not torch.allclose(*log_probs)


def test_lora():
    torch.manual_seed(0)
    model = get_peft_model(make_model("llama_untied"), LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    log_probs, mixed_log_probs = dense_model_log_probs(model.get_base_model(), make_inputs())
    expected = parameter_gradients(model, scalar_loss(log_probs, mixed_log_probs))
    add_heads(model.get_base_model())
    outputs = model(**make_inputs(), fused_lm_head=True, **mixup())
    torch.testing.assert_close(outputs.mixed_log_probs, mixed_log_probs)
    with Operations() as operations:
        gradients = parameter_gradients(model, scalar_loss(outputs.log_probs, outputs.mixed_log_probs))
    assert_close_gradients(gradients, expected)
    # The forward pass has made all there is to make with the frozen head
    assert not {rows * 61 * 16 for rows in (4, 8, 22, 30)} & set(operations.products)


def test_prompt_learning_moves_no_position():
    torch.manual_seed(0)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(make_model("llama_untied"), config)
    add_heads(model.get_base_model())
    # The first token, too, is predicted here: by a virtual token. It is column -1 of the plain grid.
    pairs = [((2, -1), (3, -1)), *PAIRS[:3]]
    outputs = model(**make_inputs(), fused_lm_head=True, **mixup(pairs=pairs))
    assert outputs.label_mask.shape == (4, 12)
    logits = model(**{key: value for key, value in make_inputs().items() if key != "labels"}).logits[:, 2:-1]
    labels = make_inputs()["labels"]
    for index, ((row_c, column_c), (row_u, column_u)) in enumerate(pairs):
        share = SHARES[index]
        log_p = (share * logits[row_c, column_c + 1] + (1 - share) * logits[row_u, column_u + 1]).log_softmax(-1)
        expected = share * log_p[labels[row_c, column_c + 1]] + (1 - share) * log_p[labels[row_u, column_u + 1]]
        torch.testing.assert_close(outputs.mixed_log_probs[index], expected)


def test_weights_as_a_list():
    model = make_model("llama_tied")
    add_heads(model)
    inputs = {**make_inputs(), "fused_lm_head": True, **mixup()}
    as_list = model(**{**inputs, "mixup_weights": SHARES})
    assert torch.equal(as_list.mixed_log_probs, model(**inputs).mixed_log_probs)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("error:FSDP2-wrapped module.*returned a view tensor")
def test_sharded_head(one_process):
    model = make_model("llama_untied")
    add_heads(model)
    expected = model(**make_inputs(), fused_lm_head=True, **mixup())
    gradients = parameter_gradients(model, scalar_loss(expected.log_probs, expected.mixed_log_probs))
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model.lm_head, mesh=mesh)  # a group of its own: its weight stays sharded in the model's forward
    fully_shard(model, mesh=mesh)
    outputs = model(**make_inputs(), fused_lm_head=True, **mixup())
    torch.testing.assert_close(outputs.mixed_log_probs, expected.mixed_log_probs)
    scalar_loss(outputs.log_probs, outputs.mixed_log_probs).backward()
    assert isinstance(model.lm_head.weight, DTensor)
    sharded = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    assert_close_gradients(sharded, gradients)


def test_mixed_precision_casts_tensors_but_not_lists(one_process):
    """Why the weights may be a list: FSDP rounds a tensor of λ to bfloat16."""
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, inputs, weights):
            seen.append(torch.as_tensor(weights, dtype=torch.float32))
            return super().forward(inputs)

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = fully_shard(Model(2, 2), mesh=dist.device_mesh.init_device_mesh("cpu", (1,)), mp_policy=policy)
    for weights in (torch.tensor(SHARES), SHARES):
        model(torch.zeros(1, 2), weights=weights)
    assert not torch.equal(seen[0], torch.tensor(SHARES)) and torch.equal(seen[1], torch.tensor(SHARES))


def test_models_it_can_not_be_added_to():
    model = make_model("llama_tied")
    with pytest.raises(ValueError, match="Call `add_fused_lm_head` first"):
        add_paired_lm_head(model)
    add_fused_lm_head(model, temperature=0.7)
    with pytest.raises(ValueError, match="`temperature`"):
        add_paired_lm_head(model)
