"""The loss against a slow reference in plain Python, value and closed-form gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft_variants.sft_go.loss import group_optimization, uniform_token_weights


def reference(nll, weights, groups, scopes, num_segments, worst_group_weight):
    """Loss and gradient by the formula, token by token. Lists of one number a token."""
    loss, gradient = 0.0, [0.0] * len(nll)
    for scope in range(num_segments):
        tokens = [t for t in range(len(nll)) if scopes[t] == scope and weights[t] > 0]
        if not tokens:
            continue
        total = sum(weights[t] for t in tokens)
        means = {}
        for group in sorted({groups[t] for t in tokens} - {-1}):
            members = [t for t in tokens if groups[t] == group]
            means[group] = sum(weights[t] * nll[t] for t in members) / sum(weights[t] for t in members)
        worst = max(means, key=means.get) if means else None
        worst_tokens = [t for t in tokens if worst is None or groups[t] == worst]
        worst_total = sum(weights[t] for t in worst_tokens)
        loss += total * worst_group_weight * sum(weights[t] * nll[t] for t in worst_tokens) / worst_total
        loss += (1 - worst_group_weight) * sum(weights[t] * nll[t] for t in tokens)
        for t in tokens:
            gradient[t] += (1 - worst_group_weight) * weights[t]
        for t in worst_tokens:
            gradient[t] += worst_group_weight * total * weights[t] / worst_total
    return loss, gradient


@st.composite
def batches(draw):
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    num_tokens, num_groups, num_segments = rows * length, draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def one_per_token(values):
        return draw(st.lists(values, min_size=num_tokens, max_size=num_tokens))

    nll = torch.rand(num_tokens, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) * 8
    mask = one_per_token(st.booleans())
    if draw(st.booleans()):
        mask[:length] = [False] * length  # a fully masked row
    return {
        "shape": (rows, length),
        "nll": [value if kept else 0.0 for value, kept in zip(nll.tolist(), mask, strict=True)],
        "mask": mask,
        "groups": one_per_token(st.integers(-1, num_groups - 1)),
        "scopes": one_per_token(st.integers(0, num_segments - 1)),
        "num_segments": num_segments,
    }


@given(batch=batches(), worst_group_weight=st.sampled_from([0.0, 0.3, 0.9, 1.0]), uniform=st.booleans())
@settings(max_examples=300, deadline=None)
def test_value_and_gradient_equal_the_formula(batch, worst_group_weight, uniform):
    shape = batch["shape"]
    mask = torch.tensor(batch["mask"]).view(shape)
    scopes = torch.tensor(batch["scopes"]).view(shape)
    log_probs = -torch.tensor(batch["nll"]).view(shape).requires_grad_()
    log_probs.retain_grad()
    weights = uniform_token_weights(mask, scopes, batch["num_segments"]) if uniform else mask.float()
    result = group_optimization(
        log_probs,
        weights,
        torch.tensor(batch["groups"]).view(shape),
        scopes,
        batch["num_segments"],
        worst_group_weight,
    )
    result.loss_sum.backward()

    counts = [sum(s == t and m for t, m in zip(batch["scopes"], batch["mask"], strict=True)) for s in batch["scopes"]]
    plain_weights = [
        (1 / count if uniform else 1.0) if kept else 0.0 for kept, count in zip(batch["mask"], counts, strict=True)
    ]
    expected_loss, expected_gradient = reference(
        batch["nll"], plain_weights, batch["groups"], batch["scopes"], batch["num_segments"], worst_group_weight
    )
    assert math.isclose(result.loss_sum.item(), expected_loss, rel_tol=1e-5, abs_tol=1e-5)
    expected_gradient = -torch.tensor(expected_gradient).view(shape)
    torch.testing.assert_close(log_probs.grad, expected_gradient, rtol=1e-5, atol=1e-5)


@given(batch=batches())
@settings(max_examples=50, deadline=None)
def test_no_worst_group_weight_is_cross_entropy_to_the_last_bit(batch):
    log_probs = -torch.tensor(batch["nll"]).view(batch["shape"])
    mask, groups, scopes = (torch.tensor(batch[key]).view(batch["shape"]) for key in ("mask", "groups", "scopes"))
    result = group_optimization(log_probs, mask.float(), groups, scopes, batch["num_segments"], 0.0)
    assert result.loss_sum == -log_probs.sum()


def test_scopes_with_one_group_have_cross_entropy():
    log_probs = -torch.tensor([[1.0, 2.0, 6.0], [3.0, 5.0, 0.0]])
    groups = torch.tensor([[1, 1, 1], [-1, -1, -1]])
    mask = log_probs != 0
    scopes = torch.tensor([[0, 0, 0], [1, 1, 1]])
    result = group_optimization(log_probs, mask.float(), groups, scopes, 2, worst_group_weight=0.9)
    assert result.loss_sum.item() == pytest.approx(17.0)


def test_paper_weights_of_two_equal_groups():
    """With λ = 0.9 and half of the tokens important and worse, they weigh 1.9, the others 0.1."""
    log_probs = torch.tensor([[-1.0, -2.0, -1.5, -2.5]], requires_grad=True)
    groups = torch.tensor([[0, 1, 0, 1]])
    result = group_optimization(log_probs, torch.ones(1, 4), groups, torch.zeros_like(groups), 1, 0.9)
    result.loss_sum.backward()
    torch.testing.assert_close(-log_probs.grad, torch.tensor([[0.1, 1.9, 0.1, 1.9]]))
    assert result.worst_group.tolist() == [1]


def test_of_equal_groups_the_first_gets_the_gradient():
    log_probs = torch.tensor([[-2.0, -2.0]], requires_grad=True)
    groups = torch.tensor([[0, 1]])
    group_optimization(log_probs, torch.ones(1, 2), groups, torch.zeros_like(groups), 1, 1.0).loss_sum.backward()
    assert log_probs.grad.tolist() == [[-2.0, 0.0]]


@pytest.mark.parametrize("length", [0, 3])
def test_nothing_to_learn_is_a_differentiable_zero(length):
    log_probs = torch.zeros(2, length, requires_grad=True)
    nothing = torch.zeros(2, length, dtype=torch.long)
    result = group_optimization(log_probs, nothing.float(), nothing - 1, nothing, 2, 0.9)
    result.loss_sum.backward()
    assert result.loss_sum.item() == 0
    assert torch.equal(log_probs.grad, torch.zeros(2, length))


def test_chosen_group_is_taken_where_it_is():
    log_probs = -torch.tensor([[1.0, 2.0, 6.0], [3.0, 5.0, 4.0]])
    groups = torch.tensor([[1, 0, 0], [0, 0, -1]])
    scopes = torch.tensor([[0, 0, 0], [1, 1, 1]])
    result = group_optimization(log_probs, torch.ones(2, 3), groups, scopes, 2, 1.0, chosen_group=1)
    assert result.loss_sum.item() == pytest.approx(3 * 1.0 + 12.0)  # the second scope has no group 1
    assert result.worst_group.tolist() == [0, 0]


def test_a_nan_is_not_hidden():
    log_probs = torch.tensor([[float("nan"), -1.0]])
    groups = torch.tensor([[0, 1]])
    result = group_optimization(log_probs, torch.ones(1, 2), groups, torch.zeros_like(groups), 1, 0.5)
    assert result.loss_sum.isnan()
