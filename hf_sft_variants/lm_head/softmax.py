"""Softmaxes computed tile by tile, whose one or two labels are kept apart from the other tokens."""

from typing import NamedTuple

import torch

from . import tile_ops
from .tiles import Projection, TilePlan, add_product_, size


class Queries(NamedTuple):
    """
    The softmaxes to compute, one for each row and each mixture, in tile order.

    Attributes:
        labels (`torch.Tensor` of shape `(2, Q)`):
            A row has one label, a mixture two, unless they are the same; -1 where there is none.
        shares (`torch.Tensor` of shape `(2, Q)`):
            Share of each label in the log-probability.
        mix_weights (`torch.Tensor` of shape `(P,)`):
            λ of each pair.
        rows (`torch.Tensor` of shape `(N,)`), mixtures (`torch.Tensor` of shape `(P,)`):
            The query of each row, and of each mixture.
    """

    labels: torch.Tensor
    shares: torch.Tensor
    mix_weights: torch.Tensor
    rows: torch.Tensor
    mixtures: torch.Tensor

    @classmethod
    def of_rows(cls, labels: torch.Tensor, mix_weights: torch.Tensor, plan: TilePlan) -> "Queries":
        num_queries = len(labels) + len(mix_weights)
        numbers = torch.arange(num_queries, device=labels.device)
        rows = [numbers[tile.queries][: size(tile.rows)] for tile in plan.tiles]
        mixtures = [numbers[tile.queries][size(tile.rows) :] for tile in plan.tiles]
        pairs = [labels[tile.rows].view(2, -1) for tile in plan.tiles if size(tile.pairs)]
        first, second = torch.cat([labels.new_empty(2, 0), *pairs], dim=1)
        rows, mixtures = torch.cat([numbers[:0], *rows]), torch.cat([numbers[:0], *mixtures])
        query_labels = labels.new_full((2, num_queries), -1)
        query_labels[0, rows], query_labels[0, mixtures] = labels, first
        query_labels[1, mixtures] = second.masked_fill(first == second, -1)
        shares = mix_weights.new_zeros(2, num_queries)
        shares[0, rows], shares[0, mixtures] = 1, mix_weights.masked_fill(first == second, 1)
        shares[1, mixtures] = (1 - mix_weights).masked_fill(first == second, 0)
        return cls(query_labels, shares, mix_weights, rows, mixtures)

    def gather(self, of_rows: torch.Tensor | None, of_mixtures: torch.Tensor | None) -> torch.Tensor:
        """One tensor from values of the rows and of the mixtures; zero for `None`."""
        result = self.shares.new_zeros(self.shares.size(1))
        for queries, values in ((self.rows, of_rows), (self.mixtures, of_mixtures)):
            if values is not None:
                result[queries] = values.to(result.dtype)
        return result


class Softmax:
    """
    Running state of the softmaxes, updated with each chunk of the vocabulary.

    Labels are kept apart from the other tokens, because `1 - p` would cancel where the model is sure of the label.

    Args:
        queries ([`Queries`]):
            The softmaxes.
        plan ([`TilePlan`]):
            How their values are cut.
        hidden_size (`int`, *optional*):
            Number of columns of the weight, for [`directions`].
        ops (module):
            [`tile_ops`], or [`kernels`].
    """

    def __init__(self, queries: Queries, plan: TilePlan, hidden_size: int | None, ops):
        self.queries, self.plan, self.ops = queries, plan, ops
        num_queries = queries.labels.size(1)
        # In one tensor, which the kernels index
        self.state = queries.shares.new_zeros(len(tile_ops.STATE), num_queries)
        self.max, self.rest, self.value_sum, self.before, self.rescale = self.state[:5]
        self.label_values = self.state[5:]
        self.max.fill_(float("-inf"))
        self.before.fill_(float("-inf"))
        self.scratch = plan.new_tile(self.state, plan.sum_dtype) if ops is tile_ops else None
        self.weighted = None if hidden_size is None else self.state.new_zeros(num_queries, hidden_size)

    def add(self, projection: Projection) -> None:
        """Add a tile, whose values are overwritten."""
        tile, of_tile = projection.tile, projection.tile.queries
        exp_values = self.ops.fold(
            projection.values,
            self.state[:, of_tile],
            self.queries.labels[:, of_tile] - projection.chunk.start,
            self.queries.mix_weights[tile.pairs],
            self.plan.scale,
            self.plan.softcap,
            self.weighted is not None,
            self.scratch,
        )
        if self.weighted is not None:
            weighted = self.weighted[of_tile]
            weighted *= self.rescale[of_tile, None]
            add_product_(weighted, exp_values, projection.weight)

    def finish(self) -> None:
        """Compute the results, after the last chunk."""
        labels, shares = self.queries.labels, self.queries.shares
        above = self.label_values - self.max
        exp_labels = above.exp().masked_fill_(labels < 0, 0)
        others = self.rest + exp_labels.flip(0)  # without this label
        self.total = self.rest + exp_labels.sum(0)
        log_total = torch.log1p(self.rest + torch.expm1(above[0]) + exp_labels[1])
        self.log_z = self.max + log_total
        self.log_probs = (shares * (above - log_total)).sum(0)
        # Gradient on the value of each label: its share minus its probability
        self.label_gradients = (shares * others - (1 - shares) * exp_labels) / self.total
        self.entropy = self.log_z - (self.value_sum + (exp_labels * self.label_values).sum(0)) / self.total
        label_value = self.label_values[0]
        self.is_top1 = (label_value >= self.max) & (label_value > self.before)  # of equal values the first counts

    def directions(self, weight: torch.Tensor) -> torch.Tensor:
        """Gradient of the log-probability of each query on its hidden state."""
        result = self.weighted.div_(-self.total[:, None])
        gradients, softcap = self.label_gradients, self.plan.softcap
        if softcap is not None:
            gradients = gradients * (1 - (self.label_values / softcap).square())
        result.addcmul_(weight[self.queries.labels[0]].to(result.dtype), gradients[0, :, None])
        mixtures = self.queries.mixtures
        second = weight[self.queries.labels[1, mixtures].clamp(min=0)].to(result.dtype)
        result.index_add_(0, mixtures, second * gradients[1, mixtures, None])
        return result.mul_(self.plan.scale)
