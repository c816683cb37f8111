"""
Operations on a tile of logits, in torch for any device; [`kernels`] has the same in Triton.

A tile has a line for each query: its rows, then the mixtures of its pairs, which are made here.
"""

import torch

from .tiles import view


# Lines of the softmaxes' state, which [`fold`] updates
STATE = ("max", "rest", "value_sum", "before", "rescale", "label_value", "second_label_value")


def fold(
    tile: torch.Tensor,
    state: torch.Tensor,
    labels: torch.Tensor,
    mix_weights: torch.Tensor,
    scale: float,
    softcap: float | None,
    with_slope: bool,
    scratch: torch.Tensor,
) -> torch.Tensor:
    """
    Fold a tile into the state of its softmaxes.

    Args:
        tile (`torch.Tensor` of shape `(n, columns)`):
            Output of the head for the rows, and space for the mixtures; overwritten.
        state (`torch.Tensor` of shape `(7, n)`):
            The lines of `STATE`, updated: the largest value; the sums over the tokens that are not labels of
            `exp(value - max)`, and of that times the value; the largest value before the label; the factor for sums
            relative to the maximum before; the values of the labels.
        labels (`torch.Tensor` of shape `(2, n)`):
            Column of each label, outside the tile if it belongs to another chunk.
        mix_weights (`torch.Tensor` of shape `(p,)`):
            λ of the tile's pairs.
        scale (`float`), softcap (`float`, *optional*):
            As in [`TilePlan`].
        with_slope (`bool`):
            Whether to multiply the result by the slope of the soft-cap.
        scratch (`torch.Tensor`):
            Memory for as many values as the tile has, in the state's dtype.

    Returns:
        `torch.Tensor` of shape `(n, columns)`: `exp(value - max)`, 0 at the labels.
    """
    values = _values(tile, state.dtype, mix_weights, scale)
    num_rows = len(values) - len(mix_weights)
    slope = _soft_cap_(values, softcap, with_slope)
    largest, rest, value_sum, before, rescale, *label_values = state
    new_largest = torch.maximum(largest, values.amax(1))
    torch.sub(largest, new_largest, out=rescale).exp_()
    exp_values = torch.sub(values, new_largest[:, None], out=view(scratch, *values.shape)).exp_()
    for first_line, of_labels, known in ((0, labels[0], label_values[0]), (num_rows, labels[1], label_values[1])):
        of_labels, known = of_labels[first_line:], known[first_line:]
        is_here = (of_labels >= 0) & (of_labels < tile.size(1))
        columns = of_labels.clamp(0, tile.size(1) - 1)[:, None]
        known.copy_(torch.where(is_here, values[first_line:].gather(1, columns)[:, 0], known))
        part = exp_values[first_line:]
        part.scatter_(1, columns, part.gather(1, columns).masked_fill_(is_here[:, None], 0))
    _look_before(values[:num_rows], labels[0, :num_rows], largest[:num_rows], before[:num_rows])
    rest.mul_(rescale).add_(exp_values.sum(1))
    of_rows = exp_values[:num_rows]
    value_sum[:num_rows] = value_sum[:num_rows] * rescale[:num_rows] + values[:num_rows].mul_(of_rows).sum(1)
    largest.copy_(new_largest)
    if slope is not None:
        exp_values.mul_(slope)
    return exp_values if tile.dtype == exp_values.dtype else tile.copy_(exp_values)


def to_gradient(
    tile: torch.Tensor,
    log_z: torch.Tensor,
    grad: torch.Tensor,
    labels: torch.Tensor,
    label_gradients: torch.Tensor,
    mix_weights: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """
    Turn a tile into the gradient on the head's output for its rows.

    Args:
        tile, labels, mix_weights, scale, softcap:
            As in [`fold`].
        log_z (`torch.Tensor` of shape `(n,)`):
            Logarithm of the softmaxes' denominators.
        grad (`torch.Tensor` of shape `(n,)`):
            Gradient on the queries' log-probabilities.
        label_gradients (`torch.Tensor` of shape `(2, n)`):
            Gradient of the log-probability on the values of the labels.

    Returns:
        `torch.Tensor` of shape `(num_rows, columns)`.
    """
    values = _values(tile, log_z.dtype, mix_weights, scale)
    num_pairs = len(mix_weights)
    num_rows = len(values) - num_pairs
    slope = _soft_cap_(values, softcap, True)
    values.sub_(log_z[:, None]).exp_().mul_(-grad[:, None])
    for first_line, line in ((0, 0), (num_rows, 1)):
        of_labels, part = labels[line, first_line:], values[first_line:]
        is_here = ((of_labels >= 0) & (of_labels < tile.size(1)))[:, None]
        columns = of_labels.clamp(0, tile.size(1) - 1)[:, None]
        at_label = (grad * label_gradients[line])[first_line:, None]
        part.scatter_(1, columns, torch.where(is_here, at_label, part.gather(1, columns)))
    if slope is not None:
        values.mul_(slope)
    if scale != 1:
        values.mul_(scale)
    if num_pairs:
        mixed = values[num_rows:]
        values[:num_pairs].addcmul_(mixed, mix_weights[:, None])
        values[num_pairs:num_rows].addcmul_(mixed, 1 - mix_weights[:, None])
    values = values[:num_rows]
    return values if tile.dtype == values.dtype else tile[:num_rows].copy_(values)


def _values(tile, dtype, mix_weights, scale) -> torch.Tensor:
    """The scaled values of rows and mixtures, before the soft-cap; in the tile itself if it has the dtype."""
    values = tile.to(dtype)
    num_pairs = len(mix_weights)
    rows = values[: len(values) - num_pairs]
    if scale != 1:
        rows.mul_(scale)
    if num_pairs:
        # Before the soft-cap the head is linear, so its output for a mixture is the mixture of its outputs
        torch.lerp(rows[num_pairs:], rows[:num_pairs], mix_weights[:, None], out=values[len(rows) :])
    return values


def _soft_cap_(values: torch.Tensor, softcap: float | None, with_slope: bool) -> torch.Tensor | None:
    """Apply the soft-cap in place and return its slope."""
    if softcap is None:
        return None
    values.div_(softcap).tanh_()
    slope = 1 - values.square() if with_slope else None
    values.mul_(softcap)
    return slope


def _look_before(values, labels, largest, before) -> None:
    """Update the largest value before the label of the rows whose label is here."""
    (here,) = torch.nonzero((labels >= 0) & (labels < values.size(1)), as_tuple=True)
    is_after = torch.arange(values.size(1), device=values.device) >= labels[here, None]
    in_tile = values[here].masked_fill_(is_after, float("-inf")).amax(1)
    before[here] = torch.maximum(largest[here], in_tile)
