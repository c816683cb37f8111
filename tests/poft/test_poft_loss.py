import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft_variants.base.metrics import MetricSums
from hf_sft_variants.poft.loss import preference_loss


@st.composite
def batches(draw, min_references=1):
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    num_samples, num_references = draw(st.integers(1, 5)), draw(st.integers(min_references, 3))
    size = rows * length

    def one_per_token(values):
        return torch.tensor(draw(st.lists(values, min_size=size, max_size=size))).view(rows, length)

    sample_ids = one_per_token(st.integers(0, num_samples - 1))
    finite = st.floats(-8, 0, width=32)
    references = torch.tensor(
        draw(st.lists(finite, min_size=num_references * num_samples, max_size=num_references * num_samples))
    )
    references = references.view(num_references, num_samples)
    return {
        "log_probs": one_per_token(finite).double().requires_grad_(),
        "scored_mask": one_per_token(st.booleans()),
        "sample_ids": sample_ids,
        "num_samples": num_samples,
        "reference_log_probs": references.double()[:, sample_ids],
        "beta": draw(st.sampled_from([0.3, 1.0, 4.0])),
        "gamma": draw(st.sampled_from([-1.5, 0.0, 0.7])),
    }


def examples_of(batch):
    """Scored log-probabilities of each example, and the references' values, one by one."""
    log_probs, mask, ids = (batch[name].flatten().tolist() for name in ("log_probs", "scored_mask", "sample_ids"))
    references = batch["reference_log_probs"].flatten(1).tolist()
    for sample in range(batch["num_samples"]):
        tokens = [t for t in range(len(ids)) if ids[t] == sample and mask[t]]
        yield tokens, [log_probs[t] for t in tokens], [values[tokens[0]] for values in references] if tokens else []


def slow_loss_and_gradient(batch, weighting):
    """From the formula, in plain Python: the loss, its gradient, and each scored example's τ."""
    beta, gamma = batch["beta"], batch["gamma"]
    loss, gradient, taus = 0.0, [0.0] * batch["log_probs"].numel(), []
    for tokens, log_probs, references in examples_of(batch):
        if not tokens:
            continue
        r_theta = math.fsum(log_probs) / len(tokens)
        margin = beta * (r_theta - math.fsum(references) / len(references)) + gamma if references else 0.0
        if weighting == "poft":
            tau = 1 / (1 + math.exp(margin))
            loss += math.log1p(math.exp(-margin))
        else:
            tau = 1.0 if weighting == "uniform" else 1 / (1 + math.exp(gamma))
            loss += -r_theta * tau * (1 if weighting == "uniform" else beta)
        taus.append(tau)
        for t in tokens:
            gradient[t] = -tau * (1 if weighting == "uniform" else beta) / len(tokens)
    return loss, gradient, taus


@given(batch=batches(), weighting=st.sampled_from(["poft", "uniform", "constant"]))
@settings(max_examples=120, deadline=None)
def test_values_and_gradients_equal_slow_ones(batch, weighting):
    result = preference_loss(**batch, weighting=weighting)
    loss, gradient, taus = slow_loss_and_gradient(batch, weighting)
    assert result.loss_sum.item() == pytest.approx(loss, rel=1e-9, abs=1e-12)
    result.loss_sum.backward()
    assert batch["log_probs"].grad.flatten().tolist() == pytest.approx(gradient, rel=1e-9, abs=1e-12)
    assert result.tau[result.is_scored].tolist() == pytest.approx(taus, rel=1e-9)
    assert not result.tau[~result.is_scored].any() and not result.log_prob[~result.is_scored].any()


@given(batch=batches())
@settings(max_examples=100, deadline=None)
def test_gradient_is_that_of_cross_entropy_with_detached_weights(batch):
    """β·τ times the mean negative log-likelihood of each example, in float32."""
    batch = {
        name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in batch.items()
    }
    log_probs = batch["log_probs"].detach().requires_grad_()
    result = preference_loss(**{**batch, "log_probs": log_probs}, weighting="poft")
    (gradient,) = torch.autograd.grad(result.loss_sum, log_probs)
    cross_entropy = sum(
        batch["beta"] * result.tau[sample] * -log_probs.flatten()[tokens].mean()
        for sample, (tokens, _, _) in enumerate(examples_of(batch))
        if tokens
    )
    if torch.is_tensor(cross_entropy):
        (expected,) = torch.autograd.grad(cross_entropy, log_probs)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


def loss_of(log_probs, is_scored, references, weighting="poft"):
    """Loss of one example in each row."""
    rows, length = log_probs.shape
    sample_ids = torch.arange(rows)[:, None].expand(rows, length)
    scored_mask = torch.full((rows, length), is_scored)
    return preference_loss(log_probs, scored_mask, sample_ids, rows, references, 1.0, 0.0, weighting)


@pytest.mark.parametrize(("margin", "tau"), [(1e4, 0.0), (-1e4, 1.0)])
def test_finite_at_large_margins(margin, tau):
    log_probs = torch.full((1, 4), -1.0, requires_grad=True)
    result = loss_of(log_probs, True, torch.full((1, 1, 4), -1.0 - margin))
    assert result.loss_sum.item() == pytest.approx(max(-margin, 0))
    assert result.tau.tolist() == [tau]
    result.loss_sum.backward()
    assert log_probs.grad.tolist() == [pytest.approx([-tau / 4] * 4)]


@pytest.mark.parametrize(("reference", "tau"), [(-1, 0.5), (-2, 0.27), (-3, 0.12)])
def test_weights_of_the_paper(reference, tau):
    result = loss_of(torch.full((1, 1), -1.0), True, torch.full((2, 1, 1), float(reference)))
    assert result.tau.item() == pytest.approx(tau, abs=0.005)


@pytest.mark.parametrize(("num_references", "weighting"), [(2, "poft"), (0, "uniform")])
def test_nothing_scored_is_a_differentiable_zero(num_references, weighting):
    log_probs = torch.full((2, 3), -1.0, requires_grad=True)
    result = loss_of(log_probs, False, torch.full((num_references, 2, 3), -1.0), weighting)
    (gradient,) = torch.autograd.grad(result.loss_sum, log_probs)
    assert result.loss_sum == 0 and not gradient.any()


@given(batches=st.lists(batches(), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_metrics_over_micro_batches(batches):
    """Of all examples together, not means over micro-batches."""
    sums, accelerator = MetricSums(), Accelerator(cpu=True)
    taus, margins = [], []
    for batch in batches:
        batch["reference_log_probs"] = batch["reference_log_probs"][:1]
        result = preference_loss(**batch, weighting="poft")
        sums.add("train", {"nll": (1.0, 1), **result.metrics(["a"])}, accelerator)
        taus += slow_loss_and_gradient(batch, "poft")[2]
        margins += [sum(p) / len(p) - r[0] for _, p, r in examples_of(batch) if p]
    logged = sums.take("train")
    assert sums.take("train") == {}
    if not taus:
        assert logged == {"nll": 1.0}
        return
    assert logged["poft/tau_min"] == pytest.approx(min(taus))
    assert logged["poft/tau_max"] == pytest.approx(max(taus))
    assert logged["poft/tau_mean"] == pytest.approx(sum(taus) / len(taus))
    assert logged["poft/margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-9)
    assert logged["poft/margin"] == pytest.approx(logged["poft/r_theta"] - logged["poft/reference_mean"], abs=1e-9)
    assert logged["poft/reference_a"] == logged["poft/reference_mean"]
    size = sum(taus) ** 2 / (len(taus) * sum(tau**2 for tau in taus))
    assert logged["poft/effective_sample_size"] == pytest.approx(size)
    assert "poft/tau_square_mean" not in logged
