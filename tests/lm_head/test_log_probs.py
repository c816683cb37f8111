"""`label_log_probs` against dense logits in double precision and against TRL's head, and what it may cost."""

import pytest
import torch
from helpers import Operations
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_head.dense import dense_log_probs, double, freeze, gradients_of, make_case, random_upstream, relative_error
from trl.kernels import ChunkedLogProbFunction

from hf_sft_variants.lm_head import autograd, label_log_probs


SOFTCAP = {"softcap": 2.0, "scale": 0.3}


@st.composite
def cases(draw):
    num_rows = draw(st.integers(2, 12))
    num_pairs = draw(st.integers(0, num_rows // 2))
    return make_case(
        num_rows,
        num_pairs,
        vocab=draw(st.integers(2, 17)),
        hidden=draw(st.integers(1, 6)),
        dtype=torch.float32,
        bias=draw(st.booleans()),
        ignored=draw(st.integers(0, num_rows - 2 * num_pairs)),
        seed=draw(st.integers(0, 99)),
        softcap=draw(st.sampled_from([None, 2.0])),
        scale=draw(st.sampled_from([1.0, 0.3])),
        tile=(draw(st.sampled_from([1, 2, 5, 64])), draw(st.sampled_from([1, 3, 8, 64]))),
    )


@given(case=cases(), used=st.sampled_from([(True, True), (True, False), (False, True)]), frozen=st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_like_dense_soft_label_cross_entropy(case, used, frozen):
    case = freeze(case) if frozen else case
    upstream = [g if is_used else None for is_used, g in zip(used, random_upstream(case), strict=True)]
    outputs, gradients = gradients_of(label_log_probs, case, upstream)
    expected, expected_gradients = gradients_of(dense_log_probs, double(case), upstream)
    for values, reference in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        torch.testing.assert_close(values, reference.to(values.dtype), rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("head", [{}, SOFTCAP])
@pytest.mark.parametrize("tile", [(7, 40), None])
def test_float32_to_one_in_a_million(tile, head, frozen):
    case = make_case(211, 70, 301, 33, dtype=torch.float32, ignored=20, tile=tile, **head)
    case = freeze(case) if frozen else case
    outputs, gradients = gradients_of(label_log_probs, case, random_upstream(case))
    expected, expected_gradients = gradients_of(dense_log_probs, double(case), random_upstream(case))
    assert torch.equal(outputs.is_top1, expected[2])
    for values, reference in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        assert relative_error(values, reference.double()) < 1e-6


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("head", [{}, SOFTCAP])
def test_gradcheck(head, frozen):
    case = make_case(num_rows=7, num_pairs=2, vocab=6, hidden=3, tile=(2, 4), **head)
    case = freeze(case) if frozen else case
    inputs = [case.pop(name) for name in ("hidden_states", "weight", "bias")]

    def differentiable(*inputs):
        outputs = label_log_probs(*inputs, **case)
        return outputs.log_probs, outputs.mixed_log_probs

    assert torch.autograd.gradcheck(differentiable, inputs)


def trl_log_probs(hidden_states, weight, bias, labels, **_):
    names = ("log_probs", "entropy", "is_top1")
    log_probs, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(
        hidden_states, weight, bias, labels, 1.0, 64, None, 1.0, names
    )
    return log_probs, entropy, is_top1, log_probs[:0]


def confident_case(probability, dtype):
    """Hidden states whose label has about this probability."""
    case = make_case(40, 12, 50, 16, dtype=torch.float64, bias=False, ignored=0, tile=(16, 16))
    weight, labels = case["weight"].detach(), case["labels"]
    towards = torch.linalg.pinv(weight - weight.mean(0))[:, labels].T
    low, high = torch.zeros(len(labels), 1), torch.full((len(labels), 1), 500.0)
    for _ in range(50):
        middle = (low + high) / 2
        is_low = (towards * middle @ weight.T).softmax(1).gather(1, labels[:, None]) < probability
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    case |= {"hidden_states": towards * low, "weight": weight}
    return case | {name: case[name].to(dtype).requires_grad_() for name in ("hidden_states", "weight")}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [None, 0.9, 0.999, 0.99999])
def test_no_worse_than_trl_also_where_the_model_is_sure(probability, dtype, frozen):
    """The gradient is in proportion to 1 - p, which would cancel if p came first."""
    if probability is None:
        case = make_case(40, 15, 50, 16, dtype=dtype, bias=False, ignored=0, tile=(16, 16))
    else:
        case = confident_case(probability, dtype)
    case = freeze(case) if frozen else case
    upstream = [random_upstream(case)[0], None]
    expected, expected_gradients = gradients_of(dense_log_probs, double(case), upstream)
    errors = []
    for function in (label_log_probs, trl_log_probs):
        outputs, gradients = gradients_of(function, case, upstream)
        values = zip([outputs[0], *gradients], [expected[0], *expected_gradients], strict=True)
        errors.append([relative_error(value, reference) for value, reference in values])
    for ours, of_trl in zip(*errors, strict=True):
        assert ours < 1.1 * of_trl + 1e-6


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_are_for_the_products_only(autocast, dtype, frozen):
    case = make_case(40, 15, 50, 8, dtype=torch.float32 if autocast else dtype, tile=(8, 16))
    case = freeze(case) if frozen else case
    with torch.autocast("cpu", dtype, enabled=autocast):
        outputs, gradients = gradients_of(label_log_probs, case, random_upstream(case))
    expected, expected_gradients = gradients_of(dense_log_probs, double(case), random_upstream(case))
    assert outputs[0].dtype == outputs[1].dtype == outputs[3].dtype == torch.float32
    for values, reference in zip([outputs[3], *gradients], [expected[3], *expected_gradients], strict=True):
        assert relative_error(values, reference) < 0.01
    assert {gradient.dtype for gradient in gradients} == {case["weight"].dtype}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_one_is_that_row_alone(share):
    case = make_case(dtype=torch.float32)
    outputs = label_log_probs(**{**case, "mix_weights": torch.full((8,), share)})
    row = case["first" if share else "second"]
    torch.testing.assert_close(outputs.mixed_log_probs, outputs.log_probs[row])


def test_gradient_reaches_both_rows_and_no_other():
    case = make_case(num_pairs=2)
    label_log_probs(**case).mixed_log_probs.sum().backward()
    reached = case["hidden_states"].grad.abs().sum(1) > 0
    assert reached.nonzero().flatten().tolist() == sorted([*case["first"].tolist(), *case["second"].tolist()])


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_of_equal_logits_the_first_counts_as_in_trl(columns):
    hidden_states, weight = torch.ones(6, 1), torch.tensor([[0.0], [2.0], [1.0], [2.0], [2.0]])
    labels = torch.tensor([0, 1, 2, 3, 4, 1])
    is_top1 = label_log_probs(hidden_states, weight, None, labels, tile=(4, columns)).is_top1
    expected = trl_log_probs(hidden_states, weight, None, labels)[2]
    assert is_top1.tolist() == expected.tolist() == [False, True, False, False, False, True]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("num_rows", [0, 5])
def test_no_label_gives_differentiable_zeros(num_rows, frozen):
    case = make_case(num_rows, 0, dtype=torch.float32, ignored=num_rows)
    case = freeze(case) if frozen else case
    outputs = label_log_probs(**case)
    assert not any(values.any() for values in outputs)
    (outputs.log_probs.sum() + outputs.mixed_log_probs.sum()).backward()
    for name in ("hidden_states", "weight", "bias"):
        assert not case[name].requires_grad or torch.equal(case[name].grad, torch.zeros_like(case[name]))


def test_pairs_that_can_not_be():
    case = make_case()
    unlabelled = (case["labels"] == -100).nonzero()[0]
    for name, row in (("first", unlabelled), ("first", case["first"][1]), ("second", case["first"][1])):
        positions = case[name].clone()
        positions[0] = row
        with pytest.raises(ValueError, match="no label, or is in two pairs"):
            label_log_probs(**{**case, name: positions})
    with pytest.raises(ValueError, match="must have one length, got 8, 8 and 1"):
        label_log_probs(**{**case, "mix_weights": torch.ones(1)})


# What it costs


def operations_of(function, **case):
    with Operations() as operations:
        outputs = function(**case)
        sum(output.sum() for output in (outputs[0], outputs[3]) if output.requires_grad).backward()
    return operations


@pytest.mark.parametrize("tile", [None, (8, 16)])
@pytest.mark.parametrize(
    "frozen, kept, num_pairs, products",
    [
        (True, False, 0, 2),
        (True, False, 20, 2.5),
        (True, False, 10, 2.25),
        (False, False, 20, 4),
        (False, True, 20, 3),
    ],
)
def test_products(frozen, kept, num_pairs, products, tile, monkeypatch):
    if not kept:
        monkeypatch.setattr(autograd, "KEPT_BYTES", 0)
    case = make_case(40, num_pairs, 50, 5, dtype=torch.float32, ignored=0, tile=tile)
    case = freeze(case) if frozen else case
    assert sum(operations_of(label_log_probs, **case).products) == products * 40 * 50 * 5
    assert sum(operations_of(trl_log_probs, **case).products) == (3 if frozen else 4) * 40 * 50 * 5


def test_products_where_less_is_trained(monkeypatch):
    monkeypatch.setattr(autograd, "KEPT_BYTES", 0)
    case = make_case(40, 15, 50, 5, ignored=10)
    case["hidden_states"].requires_grad_(False)
    assert sum(operations_of(label_log_probs, **case).products) == 3 * 30 * 50 * 5  # of the labelled rows alone
    with torch.no_grad(), Operations() as operations:
        label_log_probs(**case)
    assert sum(operations.products) == 30 * 50 * 5


def test_logits_exist_one_tile_at_a_time():
    case = make_case(64, 30, 300, 4, dtype=torch.float32, tile=(20, 50), **SOFTCAP)
    assert operations_of(label_log_probs, **freeze(case)).largest == 30 * 50  # a tile with its mixtures
    case = make_case(4096, 0, 9001, 1, dtype=torch.float32, ignored=0)
    assert operations_of(label_log_probs, **freeze(case)).largest <= 2**20
