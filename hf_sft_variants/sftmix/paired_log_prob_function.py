"""The autograd function behind [`paired_log_probs`]: logits tile by tile, mixed while they are at hand."""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..base.trl_internals import maybe_gather_lm_head_ctx


class TilePlan(NamedTuple):
    """
    How logits are cut into tiles and what follows the product with the weight.

    Attributes:
        tiles (`list[tuple[slice, slice]]`):
            Rows of each tile and its pairs. Of `n` pairs, the firsts are the first `n` rows, the seconds the others.
        chunks (`list[slice]`):
            The vocabulary in parts, the largest first.
        softcap (`float`, *optional*):
            The logits are `softcap * tanh(values / softcap)` of the scaled values.
        logit_scale (`float`):
            Factor of what the head gives.
        product_dtype (`torch.dtype`):
            Of the matrix products. Everything else is in float32, or in float64 if the products are.
    """

    tiles: list[tuple[slice, slice]]
    chunks: list[slice]
    softcap: float | None
    logit_scale: float
    product_dtype: torch.dtype

    @property
    def value_dtype(self) -> torch.dtype:
        return torch.promote_types(self.product_dtype, torch.float32)

    def new_memory(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Memory for the largest tile; see [`_view`]."""
        num_rows = max((_size(rows) for rows, _ in self.tiles), default=0)
        return like.new_empty(num_rows * _size(self.chunks[0]), dtype=dtype)


class _Projection(NamedTuple):
    """A tile's product with a chunk of the weight."""

    rows: slice
    pairs: slice
    chunk: slice
    hidden: torch.Tensor
    weight: torch.Tensor
    product: torch.Tensor
    values: torch.Tensor  # scaled, before the soft-cap; `product` itself if that is in float32


def _project(hidden, weight, bias, plan: TilePlan):
    """Yield the [`_Projection`] of each tile and chunk, one after the other in the same memory."""
    product_memory = plan.new_memory(hidden, plan.product_dtype)
    value_memory = None if plan.product_dtype == plan.value_dtype else plan.new_memory(hidden, plan.value_dtype)
    hidden = hidden.to(plan.product_dtype)
    for chunk in plan.chunks:  # the outer loop, so that a chunk of the weight and its gradient stay in the cache
        chunk_weight = weight[chunk].to(plan.product_dtype)
        chunk_bias = None if bias is None else bias[chunk].to(plan.product_dtype)
        for rows, pairs in plan.tiles:
            product = _view(product_memory, _size(rows), _size(chunk))
            torch.mm(hidden[rows], chunk_weight.t(), out=product)
            if chunk_bias is not None:
                product.add_(chunk_bias)
            values = product if value_memory is None else _view(value_memory, *product.shape).copy_(product)
            if plan.logit_scale != 1:
                values.mul_(plan.logit_scale)
            yield _Projection(rows, pairs, chunk, hidden[rows], chunk_weight, product, values)


class PairedLogProbFunction(torch.autograd.Function):
    """
    As [`paired_log_probs`], for rows that all have a label and stand in the order of the tiles.

    Returns log-probability and entropy of the rows, whether their label is the most likely one, and the mixed
    log-probability of the pairs. The backward pass makes each tile's values again, turns them into their gradient in
    place, adds the gradient on the mixed values to it, and multiplies the sum with hidden states and weight.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, mix_weights, plan):
        softmax, mixed_softmax = (_RunningSoftmax(like) for like in (mix_weights.new_empty(len(labels)), mix_weights))
        sum_exp_values = torch.zeros_like(softmax.max)
        best_labels = torch.zeros_like(labels)
        memory = plan.new_memory(hidden, plan.value_dtype)
        for rows, pairs, chunk, *_, values in _project(hidden, weight, bias, plan):
            chunk_labels = labels[rows] - chunk.start
            if _size(pairs):
                mixed = _mix_(memory, values, mix_weights[pairs])
                _soft_cap_(mixed, plan.softcap)
                for pair_labels, share in _pair_targets(chunk_labels, mix_weights[pairs]):
                    mixed_softmax.label_values[pairs] += share * _at_labels(mixed, pair_labels)
                mixed_softmax.add(pairs, mixed, mixed.amax(1), exp_values=mixed)
            _soft_cap_(values, plan.softcap)
            softmax.label_values[rows] += _at_labels(values, chunk_labels)
            chunk_max, chunk_best = values.max(1)
            is_better = chunk_max > softmax.max[rows]  # of equal values the first counts, as with TRL
            best_labels[rows] = torch.where(is_better, chunk_best + chunk.start, best_labels[rows])
            exp_values = _view(memory, *values.shape)
            rescale = softmax.add(rows, values, chunk_max, exp_values)
            sum_exp_values[rows] = sum_exp_values[rows] * rescale + values.mul_(exp_values).sum(1)

        log_z, mixed_log_z = softmax.log_z(), mixed_softmax.log_z()
        entropy = log_z - sum_exp_values / softmax.sum_exp
        is_top1 = best_labels == labels
        ctx.save_for_backward(hidden, weight, bias, labels, mix_weights, log_z, entropy, mixed_log_z)
        ctx.plan = plan
        ctx.mark_non_differentiable(is_top1)
        ctx.set_materialize_grads(False)  # the entropy is often only logged
        return softmax.label_values - log_z, entropy, is_top1, mixed_softmax.label_values - mixed_log_z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy, _, grad_mixed):
        hidden, weight, bias, labels, mix_weights, log_z, entropy, mixed_log_z = ctx.saved_tensors
        plan = ctx.plan
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(log_z)
        memory = plan.new_memory(hidden, plan.value_dtype)
        with maybe_gather_lm_head_ctx(weight, bias):  # DeepSpeed ZeRO-3
            inputs = hidden, weight, bias
            gradients = [
                torch.zeros_like(tensor, dtype=plan.value_dtype) if needed else None
                for tensor, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)
            ]
            for tile in _project(hidden, weight, bias, plan):
                rows, pairs, values = tile.rows, tile.pairs, tile.values
                chunk_labels = labels[rows] - tile.chunk.start
                pair_targets = []
                if _size(pairs) and grad_mixed is not None:
                    mixed = _mix_(memory, values, mix_weights[pairs])
                    pair_targets = _pair_targets(chunk_labels, mix_weights[pairs])
                    _to_gradient_(mixed, plan.softcap, mixed_log_z[pairs], grad_mixed[pairs], pair_targets)
                grad = grad_log_probs[rows]
                row_entropy = None if grad_entropy is None else (entropy[rows], grad_entropy[rows])
                _to_gradient_(values, plan.softcap, log_z[rows], grad, [(chunk_labels, 1)], row_entropy)
                for part, (_, share) in zip(values.chunk(2), pair_targets, strict=False):
                    part.addcmul_(mixed, share[:, None])
                if plan.logit_scale != 1:
                    values.mul_(plan.logit_scale)
                _add_products_(gradients, tile)
            gradients = [None if g is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)]
        return *gradients, None, None, None


class _RunningSoftmax:
    """What is known of the softmax of rows whose values arrive chunk by chunk."""

    def __init__(self, like: torch.Tensor):
        self.max = torch.full_like(like, float("-inf"))
        self.sum_exp = torch.zeros_like(like)  # of exp(values - max)
        self.label_values = torch.zeros_like(like)

    def add(
        self, rows: slice, values: torch.Tensor, chunk_max: torch.Tensor, exp_values: torch.Tensor
    ) -> torch.Tensor:
        """Write `exp(values - max)` to `exp_values`; return the factor for sums over the chunks before."""
        new_max = torch.maximum(self.max[rows], chunk_max)
        rescale = (self.max[rows] - new_max).exp_()
        torch.sub(values, new_max[:, None], out=exp_values).exp_()
        self.sum_exp[rows] = self.sum_exp[rows] * rescale + exp_values.sum(1)
        self.max[rows] = new_max
        return rescale

    def log_z(self) -> torch.Tensor:
        return self.max + self.sum_exp.log()


def _to_gradient_(values, softcap, log_z, grad, targets, entropy_and_grad=None):
    """
    Turn values before the soft-cap into the gradient on them, in place.

    With `grad` on the summed log-probability of `targets`, pairs of labels (counted from the chunk's start) and their
    shares of it, which add up to 1. `entropy_and_grad` is the rows' entropy and the gradient on it.
    """
    _soft_cap_(values, softcap)
    slope = None if softcap is None else (values / softcap).square_().neg_().add_(1)
    values.sub_(log_z[:, None])
    if entropy_and_grad is None:
        values.exp_().mul_(-grad[:, None])
    else:  # d entropy / d value = -p (log p + entropy)
        entropy, grad_entropy = entropy_and_grad
        probabilities = values.exp()
        values.add_(entropy[:, None]).mul_(-grad_entropy[:, None]).sub_(grad[:, None]).mul_(probabilities)
    all_rows = torch.arange(len(values), device=values.device)
    for labels, share in targets:
        is_here, columns = _columns(values, labels)
        values[all_rows, columns] += (grad * share).where(is_here, 0)
    if slope is not None:
        values.mul_(slope)


def _add_products_(gradients: list[torch.Tensor | None], tile: _Projection):
    """Add what a tile, whose values are their own gradient by now, adds to those of hidden states, weight and bias."""
    grad_hidden, grad_weight, grad_bias = gradients
    if tile.product is not tile.values:
        tile.product.copy_(tile.values)
    if grad_hidden is not None:
        _add_product_(grad_hidden[tile.rows], tile.product, tile.weight)
    if grad_weight is not None:
        _add_product_(grad_weight[tile.chunk], tile.product.t(), tile.hidden)
    if grad_bias is not None:
        grad_bias[tile.chunk] += tile.values.sum(0)


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor):
    """Add a product in float32, without rounding it to the dtype of its factors first."""
    if total.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _mix_(memory: torch.Tensor, values: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Values of the mixed hidden states from those of their rows, before the soft-cap."""
    first, second = values.chunk(2)
    return torch.lerp(second, first, share[:, None], out=_view(memory, *first.shape))


def _pair_targets(labels: torch.Tensor, share: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The two labels of each pair and their shares of the mixed log-probability."""
    first_labels, second_labels = labels.chunk(2)
    return [(first_labels, share), (second_labels, 1 - share)]


def _soft_cap_(values: torch.Tensor, softcap: float | None):
    if softcap is not None:
        values.div_(softcap).tanh_().mul_(softcap)


def _at_labels(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each row's value at its label, 0 where the label is in another chunk."""
    is_here, columns = _columns(values, labels)
    return values.gather(1, columns[:, None]).squeeze(1).where(is_here, 0)


def _columns(values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each label, counted from the chunk's start, is in the chunk, and its column (any other if it is not)."""
    last_column = values.size(1) - 1
    return (labels >= 0) & (labels <= last_column), labels.clamp(0, last_column)


def _size(part: slice) -> int:
    return part.stop - part.start


def _view(memory: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    return memory[: num_rows * num_columns].view(num_rows, num_columns)
