"""
The autograd function behind [`label_log_probs`].

The gradient of a label's log-probability on its hidden state is attention over the vocabulary, with the weight's rows
as keys and values: `W[y] - sum_v softmax(h W^T)[v] W[v]`. Its direction does not depend on the loss. So where the head
is frozen, the forward pass computes it, chunk by chunk with a running maximum, and the backward pass scales it: two
products with the weight instead of three.
"""

import torch
from torch.autograd.function import once_differentiable

from . import tile_ops
from .sharded import gathered
from .softmax import Queries, Softmax
from .tiles import TilePlan, add_product_, project, size


# Logits of a trained head up to this size are kept, which saves the backward pass a product
KEPT_BYTES = 2**27


class LogProbFunction(torch.autograd.Function):
    """
    As [`label_log_probs`], for rows that all have a label and are in tile order.

    Products with the weight, in units of the one that makes the logits: with a frozen head two, and half of one for
    the mixtures, all in the forward pass; with a trained head one in the forward pass and three in the backward pass,
    or two if the logits were kept; without a gradient one.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, mix_weights, plan: TilePlan):
        ctx.is_frozen = not any(ctx.needs_input_grad[1:3])
        needs_directions = ctx.is_frozen and ctx.needs_input_grad[0]
        kept = None
        if not ctx.is_frozen and len(hidden) * len(weight) * plan.product_dtype.itemsize <= KEPT_BYTES:
            kept = hidden.new_empty(len(hidden), len(weight), dtype=plan.product_dtype)
        queries = Queries.of_rows(labels, mix_weights, plan)
        softmax = Softmax(queries, plan, weight.size(1) if needs_directions else None, ops_for(hidden, plan))
        for projection in project(hidden, weight, bias, plan):
            if kept is not None:
                rows = projection.tile.rows
                kept[rows, projection.chunk] = projection.values[: size(rows)]
            softmax.add(projection)
        softmax.finish()
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        if needs_directions:
            ctx.save_for_backward(*queries, softmax.directions(weight))
        elif not ctx.is_frozen:
            ctx.save_for_backward(*queries, hidden, weight, bias, softmax.log_z, softmax.label_gradients, kept)
        rows, mixtures = queries.rows, queries.mixtures
        entropy, is_top1 = softmax.entropy[rows], softmax.is_top1[rows]
        ctx.mark_non_differentiable(entropy, is_top1)
        return softmax.log_probs[rows], entropy, is_top1, softmax.log_probs[mixtures]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, _entropy, _is_top1, grad_mixed):
        saved = ctx.saved_tensors  # read once: with activation offloading, each access loads them again
        queries, saved = Queries(*saved[:5]), saved[5:]
        grad = queries.gather(grad_log_probs, grad_mixed)
        if ctx.is_frozen:
            return _scaled_directions(queries, *saved, grad, ctx.plan), *[None] * 5
        _, weight, bias, *_ = saved
        with gathered(weight, bias):
            gradients = _gradients(queries, *saved, grad, ctx.plan, ctx.needs_input_grad[:3])
        return *gradients, None, None, None


def ops_for(tensor: torch.Tensor, plan: TilePlan):
    """The Triton kernels where they can run, [`tile_ops`] elsewhere."""
    if tensor.device.type in ("cuda", "xpu") and plan.sum_dtype == torch.float32:
        try:
            from . import kernels
        except ImportError:  # no Triton
            return tile_ops
        return kernels
    return tile_ops


def _scaled_directions(queries: Queries, directions, grad, plan) -> torch.Tensor:
    """The gradient on the hidden states of a frozen head."""
    scaled = directions * grad[:, None]
    result = scaled[queries.rows]
    for tile in plan.tiles:
        num_pairs = size(tile.pairs)
        if num_pairs:
            share, rows = queries.mix_weights[tile.pairs, None], result[tile.rows]
            mixed = scaled[tile.queries][2 * num_pairs :]
            rows[:num_pairs].addcmul_(mixed, share)
            rows[num_pairs:].addcmul_(mixed, 1 - share)
    return result


def _gradients(queries: Queries, hidden, weight, bias, log_z, label_gradients, kept, grad, plan, needed) -> list:
    """The gradients on hidden states, weight and bias of a trained head."""
    inputs = hidden, weight, bias
    grad_hidden, grad_weight, grad_bias = sums = [
        torch.zeros_like(tensor, dtype=plan.sum_dtype) if is_needed else None
        for tensor, is_needed in zip(inputs, needed, strict=True)
    ]
    ops = ops_for(hidden, plan)
    for projection in project(hidden, weight, bias, plan, kept):
        tile, chunk = projection.tile, projection.chunk
        on_values = ops.to_gradient(
            projection.values,
            log_z[tile.queries],
            grad[tile.queries],
            queries.labels[:, tile.queries] - chunk.start,
            label_gradients[:, tile.queries],
            queries.mix_weights[tile.pairs],
            plan.scale,
            plan.softcap,
        )
        if grad_hidden is not None:
            add_product_(grad_hidden[tile.rows], on_values, projection.weight)
        if grad_weight is not None:
            add_product_(grad_weight[chunk], on_values.t(), projection.hidden)
        if grad_bias is not None:
            grad_bias[chunk] += on_values.sum(0, dtype=plan.sum_dtype)
    return [None if total is None else total.to(tensor.dtype) for total, tensor in zip(sums, inputs, strict=True)]
