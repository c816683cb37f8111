"""The Triton kernels against the same operations in torch; on a CPU through Triton's interpreter."""

import pytest
import torch
from lm_head.dense import dense_log_probs, double, freeze, gradients_of, make_case, random_upstream, relative_error

from hf_sft_variants.lm_head import autograd, label_log_probs, tile_ops


pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SOFTCAP = {"softcap": 2.0, "scale": 0.3}


@pytest.fixture(scope="module")
def kernels():
    from hf_sft_variants.lm_head import kernels

    return kernels


@pytest.fixture
def with_kernels(kernels, monkeypatch):
    monkeypatch.setattr(autograd, "ops_for", lambda tensor, plan: kernels)


def random_tile(num_rows, num_pairs, columns, dtype):
    """A tile, its labels of which some are in it, and λ."""
    generator = torch.Generator().manual_seed(columns)
    lines = num_rows + num_pairs
    tile = (3 * torch.randn(lines, columns, generator=generator)).to(DEVICE, dtype)
    labels = torch.randint(-columns // 2, columns + columns // 2, (2, lines), generator=generator).to(DEVICE)
    labels[0, 0] = columns - 1
    return tile, labels, torch.rand(num_pairs, generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.3, 2.0)])
@pytest.mark.parametrize("num_rows, num_pairs, columns", [(5, 0, 1), (3, 0, 100), (2, 1, 64), (6, 3, 37)])
def test_like_tile_ops(kernels, num_rows, num_pairs, columns, scale, softcap, dtype):
    tile, labels, mix_weights = random_tile(num_rows, num_pairs, columns, dtype)
    lines = len(tile)
    results = []
    for ops in (tile_ops, kernels):
        state = torch.zeros(len(tile_ops.STATE), lines, device=DEVICE)
        state[0] = state[3] = -torch.inf
        for shift in (0, columns):  # two chunks of the vocabulary
            scratch = torch.empty(tile.numel(), device=DEVICE)
            arguments = labels - shift, mix_weights, scale, softcap, True, scratch
            exp_values = ops.fold((tile * (1 + shift)).clone(), state, *arguments)
        log_z, grad, label_gradients = (
            torch.arange(4 * lines, device=DEVICE).view(4, lines).float().sin().split([1, 1, 2])
        )
        gradients = ops.to_gradient(
            tile.clone(), log_z[0] + 3, grad[0], labels, label_gradients, mix_weights, scale, softcap
        )
        state[2:4, num_rows:] = 0  # kept for rows alone
        results.append((exp_values.clone(), state, gradients.clone()))
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
    for values, expected in zip(*results, strict=True):
        torch.testing.assert_close(values, expected, **tolerance)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("head", [{}, SOFTCAP])
def test_like_dense(with_kernels, head, frozen):
    """Pairs whose rows are anywhere, in two tiles; the vocabulary has three chunks, and none a power of two."""
    case = make_case(11, 4, 37, 8, dtype=torch.float32, tile=(4, 15), **head)
    case = {name: to_device(value) for name, value in (freeze(case) if frozen else case).items()}
    outputs, gradients = gradients_of(label_log_probs, case, random_upstream(case))
    expected, expected_gradients = gradients_of(dense_log_probs, double(case), random_upstream(case))
    assert torch.equal(outputs.is_top1, expected[2])
    for values, reference in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        assert relative_error(values, reference.double()) < 1e-6


def to_device(value):
    if not torch.is_tensor(value):
        return value
    return value.detach().to(DEVICE).requires_grad_(value.requires_grad)


@pytest.mark.parametrize("columns", [2, 5])
def test_of_equal_logits_the_first_counts(with_kernels, columns):
    hidden_states, weight = torch.ones(6, 1, device=DEVICE), torch.tensor([[0.0], [2.0], [1.0], [2.0], [2.0]])
    labels = torch.tensor([0, 1, 2, 3, 4, 1], device=DEVICE)
    is_top1 = label_log_probs(hidden_states, weight.to(DEVICE), None, labels, tile=(4, columns)).is_top1
    assert is_top1.tolist() == [False, True, False, False, False, True]
