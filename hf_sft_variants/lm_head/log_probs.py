"""Log-probabilities of labels, and of the labels of mixed hidden states, without the logits."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..errors import InputError
from .autograd import LogProbFunction
from .tiles import TilePlan, make_tiles, slices, tile_shape


class LabelLogProbs(NamedTuple):
    """
    Result of [`label_log_probs`], in nats. Only the log-probabilities have a gradient.

    Attributes:
        log_probs (`torch.Tensor` of shape `(N,)`):
            Log-probability of each label. This field and the next two are zero where there is no label.
        entropy (`torch.Tensor` of shape `(N,)`):
            Entropy of each row's distribution.
        is_top1 (`torch.Tensor` of shape `(N,)`):
            Whether the label is the most likely token (the first one, if several are equally likely).
        mixed_log_probs (`torch.Tensor` of shape `(P,)`):
            Of each mixture, `λ log p(first label) + (1 - λ) log p(second label)`.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    mixed_log_probs: torch.Tensor


def label_log_probs(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    first: torch.Tensor | None = None,
    second: torch.Tensor | None = None,
    mix_weights: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    tile: tuple[int, int] | None = None,
) -> LabelLogProbs:
    r"""
    Log-probabilities of labels under an LM head, and of the labels of mixed hidden states ([SFTMix](https://huggingface.co/papers/2410.05248)).

    Only rows with a label go through the head, and logits exist one tile at a time. In units of the product that makes
    all of them, a frozen head (LoRA, QLoRA) takes two products, where a plain fused head takes three, and half of one
    for the mixtures; a trained one takes four, or three where the logits fit 128 MiB; without a gradient it is one.
    Sums are in float32, whatever the dtype of the products, which autocast may set.

    For a pair of rows with hidden states \\( z^c, z^u \\) and labels \\( y^c, y^u \\), and \\( \tilde p \\) the
    distribution that the head gives for \\( \lambda z^c + (1-\lambda) z^u \\), the mixed log-probability is

    $$ \lambda \log \tilde p(y^c) + (1-\lambda) \log \tilde p(y^u) $$

    Args:
        hidden_states (`torch.Tensor` of shape `(N, H)`):
            Last hidden states, after the final norm.
        weight (`torch.Tensor` of shape `(V, H)`):
            Weight of the LM head.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias of the LM head.
        labels (`torch.Tensor` of shape `(N,)`):
            Token that each row predicts (already shifted), `-100` for rows to leave out.
        first, second (`torch.Tensor` of shape `(P,)`, *optional*):
            Rows that are mixed, the n-th with the n-th. Each has a label and is in one pair at most.
        mix_weights (`torch.Tensor` of shape `(P,)`, *optional*):
            Share λ of the first row of each pair, from 0 to 1. It receives no gradient.
        softcap (`float`, *optional*):
            The logits are `softcap * tanh(logits / softcap)`.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor of the logits, before the soft-cap.
        tile (`tuple[int, int]`, *optional*):
            Rows and columns of a tile. Defaults to what stays in the cache.

    Returns:
        [`LabelLogProbs`].

    Example:

    ```python
    >>> import torch
    >>> from hf_sft_variants.lm_head import label_log_probs

    >>> hidden_states, weight = torch.randn(8, 16, requires_grad=True), torch.randn(100, 16)
    >>> labels = torch.tensor([3, -100, 5, 7, 11, -100, 13, 17])
    >>> loss = -label_log_probs(hidden_states, weight, None, labels).log_probs.mean()
    >>> loss.backward()
    ```

    Raises:
        `InputError`: If a row of a pair has no label or is in two pairs, or if the pairs' lengths differ.
    """
    first = labels.new_empty(0) if first is None else first
    second = labels.new_empty(0) if second is None else second
    mix_weights = hidden_states.new_empty(0) if mix_weights is None else mix_weights
    if not len(first) == len(second) == len(mix_weights):
        raise InputError(
            f"`first`, `second` and `mix_weights` must have one length, got {len(first)}, {len(second)} and "
            f"{len(mix_weights)}."
        )
    device = hidden_states.device
    tile_rows, tile_columns = tile or tile_shape(len(weight), device)
    order = _order_rows(labels, first, second, max(tile_rows // 2, 1))
    is_autocast = torch.is_autocast_enabled(device.type)
    plan = TilePlan(
        tiles=make_tiles(len(order), len(first), tile_rows),
        chunks=slices(0, len(weight), tile_columns),
        softcap=softcap,
        scale=scale,
        product_dtype=torch.get_autocast_dtype(device.type) if is_autocast else hidden_states.dtype,
    )
    *of_rows, mixed_log_probs = LogProbFunction.apply(
        hidden_states.index_select(0, order), weight, bias, labels[order], mix_weights.to(plan.sum_dtype), plan
    )
    # `index_copy` keeps the output connected to the model even when there is no label
    log_probs, entropy, is_top1 = (values.new_zeros(len(labels)).index_copy(0, order, values) for values in of_rows)
    return LabelLogProbs(log_probs, entropy, is_top1, mixed_log_probs)


if not TYPE_CHECKING:  # as a decorator, it would hide the signature
    label_log_probs = torch.compiler.disable(label_log_probs)


def _order_rows(labels: torch.Tensor, first: torch.Tensor, second: torch.Tensor, pairs_per_tile: int) -> torch.Tensor:
    """The labelled rows in tile order: for each tile its first rows, then their partners; unpaired rows come last."""
    is_labelled = labels != -100
    is_unpaired = is_labelled.clone()
    is_unpaired[first] = False
    is_unpaired[second] = False
    tiles = zip(first.split(pairs_per_tile), second.split(pairs_per_tile), strict=True)
    order = torch.cat([*(rows for tile in tiles for rows in tile), is_unpaired.nonzero().squeeze(1)])
    if len(order) != is_labelled.sum():
        raise InputError("A row of a pair has no label, or is in two pairs.")
    return order
