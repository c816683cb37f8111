"""
The autograd function behind [`paired_log_probs`]: logits tile by tile, mixed while they are at hand.

The gradient of a label's log-probability on its hidden state is attention over the vocabulary, with the weight's rows
as keys and values: `W[y] - sum_v softmax(h W^T)[v] W[v]`. Its direction does not depend on the loss. So where the head
is frozen, the forward pass makes it, chunk by chunk with a running maximum, and the backward pass scales it: two
products with the weight instead of three.
"""

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
    As [`paired_log_probs`], for rows that all have a label and are in the order of the tiles.

    Products with the weight, in units of the one that makes the logits: with a frozen head two, and half of one for
    the mixtures, all in the forward pass; with a trained head one in the forward pass and three in the backward pass,
    which makes each tile's values again, turns them into their gradient in place and adds that of the mixtures;
    without a gradient one.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, mix_weights, plan):
        ctx.is_frozen = not any(ctx.needs_input_grad[1:3])
        hidden_size = weight.size(1) if ctx.is_frozen and ctx.needs_input_grad[0] else None
        softmax = _LabelledSoftmax([labels], hidden_size, plan)
        mixed_softmax = _LabelledSoftmax(_pair_labels(labels, plan), hidden_size, plan)
        best_labels = torch.zeros_like(labels)
        sum_exp_values = torch.zeros_like(softmax.max)
        memory = plan.new_memory(hidden, plan.value_dtype)
        for tile in _project(hidden, weight, bias, plan):
            rows, pairs, values = tile.rows, tile.pairs, tile.values
            if _size(pairs):
                mixed = _mix_(memory, values, mix_weights[pairs])
                slope = _soft_cap_(mixed, plan.softcap)
                mixed_softmax.add(pairs, tile, mixed, mixed.amax(1), mixed)
                mixed_softmax.add_weighted(pairs, tile, mixed, slope)
            slope = _soft_cap_(values, plan.softcap)
            chunk_max, chunk_best = values.max(1)
            is_better = chunk_max > softmax.max[rows]  # of equal values the first counts, as with TRL
            best_labels[rows] = torch.where(is_better, chunk_best + tile.chunk.start, best_labels[rows])
            exp_values = _view(memory, *values.shape)
            rescale = softmax.add(rows, tile, values, chunk_max, exp_values)
            sum_exp_values[rows] = sum_exp_values[rows] * rescale + values.mul_(exp_values).sum(1)
            softmax.add_weighted(rows, tile, exp_values, slope)

        one = torch.ones_like(softmax.max)
        log_probs, log_z, label_shares = softmax.finish([one])
        mixed_log_probs, mixed_log_z, mixed_shares = mixed_softmax.finish([mix_weights, 1 - mix_weights])
        (label_values,), (label_probs,) = softmax.label_values, softmax.label_probs
        entropy = log_z - sum_exp_values / softmax.total - label_probs * label_values
        is_top1 = best_labels == labels
        ctx.plan = plan
        ctx.mark_non_differentiable(entropy, is_top1)
        ctx.set_materialize_grads(False)
        if hidden_size is not None:
            directions = softmax.directions(weight, label_shares), mixed_softmax.directions(weight, mixed_shares)
            ctx.save_for_backward(mix_weights, *directions)
        elif not ctx.is_frozen:
            saved = hidden, weight, bias, labels, mix_weights, log_z, mixed_log_z, *label_shares, *mixed_shares
            ctx.save_for_backward(*saved)
        return log_probs, entropy, is_top1, mixed_log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, _entropy, _is_top1, grad_mixed):
        if ctx.is_frozen:
            return _scale_directions(*ctx.saved_tensors, grad_log_probs, grad_mixed, ctx.plan), *[None] * 5
        hidden, weight, bias, labels, mix_weights, log_z, mixed_log_z, label_share, *mixed_shares = ctx.saved_tensors
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
                of_tile = labels[rows] - tile.chunk.start
                mixed = None
                if _size(pairs) and grad_mixed is not None:
                    mixed = _mix_(memory, values, mix_weights[pairs])
                    shares = [share[pairs] for share in mixed_shares]
                    _to_gradient_(mixed, plan.softcap, mixed_log_z[pairs], grad_mixed[pairs], of_tile.chunk(2), shares)
                _to_gradient_(values, plan.softcap, log_z[rows], grad_log_probs[rows], [of_tile], [label_share[rows]])
                if mixed is not None:
                    first, second = values.chunk(2)
                    first.addcmul_(mixed, mix_weights[pairs, None])
                    second.addcmul_(mixed, 1 - mix_weights[pairs, None])
                if plan.logit_scale != 1:
                    values.mul_(plan.logit_scale)
                _add_products_(gradients, tile)
            gradients = [None if g is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)]
        return *gradients, None, None, None


class _LabelledSoftmax:
    """
    What is known of the softmax of rows whose values arrive chunk by chunk. The rows' labels (of a mixture two) are
    kept apart from the other tokens: where the model is sure of them, `1 - p` would cancel.
    """

    def __init__(self, labels: list[torch.Tensor], hidden_size: int | None, plan: TilePlan):
        self.labels, self.plan = labels, plan
        new = labels[0].new_zeros(len(labels[0]), dtype=plan.value_dtype)
        self.max = torch.full_like(new, float("-inf"))
        self.rest = torch.zeros_like(new)  # sum of exp(values - max) over the tokens that are not labels
        self.label_values = [torch.zeros_like(new) for _ in labels]
        self.weighted = None if hidden_size is None else new.new_zeros(len(new), hidden_size)

    def add(
        self, rows: slice, tile: _Projection, values: torch.Tensor, chunk_max: torch.Tensor, exp_values: torch.Tensor
    ) -> torch.Tensor:
        """
        Write `exp(values - max)` to `exp_values`, 0 at the labels. Return the factor for sums over the chunks before.
        """
        new_max = torch.maximum(self.max[rows], chunk_max)
        rescale = (self.max[rows] - new_max).exp_()
        places = [_columns(values, labels[rows] - tile.chunk.start) for labels in self.labels]
        for label_values, (is_here, columns) in zip(self.label_values, places, strict=True):
            label_values[rows] += values.gather(1, columns[:, None]).squeeze(1).where(is_here, 0)
        torch.sub(values, new_max[:, None], out=exp_values).exp_()
        for is_here, columns in places:
            _set_zero_(exp_values, is_here, columns)
        self.rest[rows] = self.rest[rows] * rescale + exp_values.sum(1)
        if self.weighted is not None:
            self.weighted[rows] *= rescale[:, None]
        self.max[rows] = new_max
        return rescale

    def add_weighted(self, rows: slice, tile: _Projection, exp_values: torch.Tensor, slope: torch.Tensor | None):
        """Add the weight's rows, each times its `exp(values - max)` and the slope of the soft-cap."""
        if self.weighted is None:
            return
        if slope is not None:
            exp_values.mul_(slope)
        if tile.product is not tile.values:
            exp_values = tile.product[: len(exp_values)].copy_(exp_values)
        _add_product_(self.weighted[rows], exp_values, tile.weight)

    def finish(self, shares: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """
        Log-probability of the labels, each times its share; log of the softmax's denominator; and the gradient on the
        value of each label, its share minus its probability.
        """
        exp_labels = [(values - self.max).exp() for values in self.label_values]
        if len(shares) == 2:  # a mixture of two rows with the same label has one label
            is_double = self.labels[0] == self.labels[1]
            shares = [torch.where(is_double, 1, shares[0]), shares[1].masked_fill(is_double, 0)]
            exp_labels[1] = exp_labels[1].masked_fill(is_double, 0)
        self.total = self.rest + sum(exp_labels)
        self.label_probs = [exp / self.total for exp in exp_labels]
        log_total = torch.log1p(self.rest + torch.expm1(self.label_values[0] - self.max) + sum(exp_labels[1:]))
        log_probs = sum(
            share * (values - self.max - log_total) for share, values in zip(shares, self.label_values, strict=True)
        )
        gradients = [
            share * (self.rest + sum(exp_labels) - exp) / self.total - (1 - share) * exp / self.total
            for share, exp in zip(shares, exp_labels, strict=True)
        ]
        return log_probs, self.max + log_total, gradients

    def directions(self, weight: torch.Tensor, label_gradients: list[torch.Tensor]) -> torch.Tensor:
        """Gradient of the log-probability on the hidden state of each row."""
        result = self.weighted.div_(-self.total[:, None])
        for labels, values, gradient in zip(self.labels, self.label_values, label_gradients, strict=True):
            if self.plan.softcap is not None:
                gradient = gradient * (1 - (values / self.plan.softcap).square())
            result.addcmul_(weight[labels].to(result.dtype), gradient[:, None])
        return result.mul_(self.plan.logit_scale)


def _scale_directions(mix_weights, directions, mixed_directions, grad_log_probs, grad_mixed, plan) -> torch.Tensor:
    """The gradient on the hidden states of a frozen head, in the order of the tiles."""
    result = torch.zeros_like(directions) if grad_log_probs is None else directions * grad_log_probs[:, None]
    for rows, pairs in plan.tiles if grad_mixed is not None else []:
        scaled = mixed_directions[pairs] * grad_mixed[pairs, None]
        first, second = result[rows].chunk(2) if _size(pairs) else (result[:0], result[:0])
        first.addcmul_(scaled, mix_weights[pairs, None])
        second.addcmul_(scaled, 1 - mix_weights[pairs, None])
    return result


def _to_gradient_(values, softcap, log_z, grad, labels, label_gradients):
    """
    Turn values before the soft-cap into the gradient on them, in place.

    With `grad` on the rows' log-probability; `labels` are counted from the chunk's start, and `label_gradients` are
    what [`_LabelledSoftmax.finish`] returns.
    """
    slope = _soft_cap_(values, softcap)
    values.sub_(log_z[:, None]).exp_().mul_(-grad[:, None])
    places = [_columns(values, of_rows) for of_rows in labels]
    for is_here, columns in places:
        _set_zero_(values, is_here, columns)
    for (is_here, columns), gradient in zip(places, label_gradients, strict=True):
        values.scatter_add_(1, columns[:, None], (grad * gradient).where(is_here, 0)[:, None])
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


def _pair_labels(labels: torch.Tensor, plan: TilePlan) -> list[torch.Tensor]:
    """The first and the second labels of all pairs."""
    halves = [labels[rows].chunk(2) for rows, pairs in plan.tiles if _size(pairs)]
    return [torch.cat([labels[:0], *(half[i] for half in halves)]) for i in range(2)]


def _soft_cap_(values: torch.Tensor, softcap: float | None) -> torch.Tensor | None:
    """Apply the soft-cap in place and return its slope."""
    if softcap is None:
        return None
    values.div_(softcap).tanh_()
    slope = 1 - values.square()
    values.mul_(softcap)
    return slope


def _set_zero_(values: torch.Tensor, is_here: torch.Tensor, columns: torch.Tensor):
    columns = columns[:, None]
    values.scatter_(1, columns, values.gather(1, columns).masked_fill(is_here[:, None], 0))


def _columns(values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each label, counted from the chunk's start, is in the chunk, and its column (any other if it is not)."""
    last_column = values.size(1) - 1
    return (labels >= 0) & (labels <= last_column), labels.clamp(0, last_column)


def _size(part: slice) -> int:
    return part.stop - part.start


def _view(memory: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    return memory[: num_rows * num_columns].view(num_rows, num_columns)
