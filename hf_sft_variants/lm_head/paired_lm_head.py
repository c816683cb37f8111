"""Mixup of last hidden states without logits of its own: those of the two rows are mixed."""

import functools
import types
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..base.trl_internals import FusedCausalLMOutput, fused_lm_head_settings, maybe_gather_lm_head_ctx
from ..errors import InputError
from .paired_log_prob_function import PairedLogProbFunction, TilePlan


# Rows of a tile as in TRL. The vocabulary is cut finer: what is done to a tile takes two to four times its memory
TILE_ROWS = 4096
TILE_VOCAB = 4096


@dataclass
class PairedCausalLMOutput(FusedCausalLMOutput):
    """
    [`~trl.trainer.utils.FusedCausalLMOutput`] of a model given a paired LM head with [`add_paired_lm_head`].

    Args:
        mixed_log_probs (`torch.Tensor` of shape `(P,)`):
            Of each mixed position, what its two labels get by the mixed distribution; see [`paired_log_probs`].
    """

    mixed_log_probs: torch.Tensor | None = None


def add_paired_lm_head(model: PreTrainedModel) -> None:
    """
    Let a model that has TRL's fused LM head also score mixtures of pairs of positions.

    `model(..., labels=labels, fused_lm_head=True, mixup_first=..., mixup_second=..., mixup_weights=...)` then returns
    a [`PairedCausalLMOutput`], whose other fields are those of TRL's head. Without these three, without a pair, or
    without `fused_lm_head=True`, the forward is TRL's own, to the last bit. Add the head before wrapping the model
    with PEFT, or to `model.get_base_model()`.

    - **mixup_first**, **mixup_second** (`torch.Tensor` of shape `(P, 2)`, int64): the positions that are mixed, the
      n-th with the n-th. A position is `(row, column)` of `label_mask`, the grid of next-token predictions, with the
      column counted from the end of the row: the last prediction is `-1`. So it stays right when prompt learning
      prepends virtual tokens. With the grid position `(row, column)` of `labels[:, 1:]`, which is `L` wide, it is
      `(row, column - L)`. Each must have a label, and is in one pair at most.
    - **mixup_weights** (`torch.Tensor` or `list[float]` of length `P`): λ, the share of the first of each pair. A list
      stays in float32 where FSDP or DeepSpeed casts every floating-point tensor to the model's dtype.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model that [`~trl.SFTTrainer`] or `add_fused_lm_head` patched.

    Raises:
        `InputError`: For a model without TRL's fused LM head, or with a temperature or a cast in it.
    """
    settings = fused_lm_head_settings(model)
    if settings["temperature"] != 1 or settings["cast_lm_head_to_fp32"]:
        raise InputError("The paired LM head supports neither `temperature` nor `cast_lm_head_to_fp32`.")
    trl_forward = model.forward.__func__
    softcapping, logit_scale = settings["final_logit_softcapping"], settings["logit_scale"]

    @torch.compiler.disable(recursive=False)
    @functools.wraps(trl_forward)  # keeps the signature, which `generate` looks at
    def forward(self, *args, mixup_first=None, mixup_second=None, mixup_weights=None, **kwargs):
        if mixup_first is None or not kwargs.get("fused_lm_head"):
            return trl_forward(self, *args, **kwargs)
        if len(mixup_first) == 0:
            outputs = trl_forward(self, *args, **kwargs)
            return PairedCausalLMOutput(**outputs, mixed_log_probs=outputs.log_probs.flatten()[:0].clone())
        head = functools.partial(paired_log_probs, final_logit_softcapping=softcapping, logit_scale=logit_scale)
        return _paired_forward(self, args, kwargs, head, (mixup_first, mixup_second, mixup_weights))

    model.forward = types.MethodType(forward, model)


@torch.compiler.disable(recursive=False)
def _paired_forward(model, args, kwargs, head, mixup) -> PairedCausalLMOutput:
    """As the forward of TRL's fused LM head, with `head` for the product with the LM head's weight."""
    kwargs = {**kwargs, "use_cache": False}
    del kwargs["fused_lm_head"]
    labels, num_items_in_batch = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
    text_config = model.config.get_text_config()
    if getattr(text_config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    # Backbone and LM head are looked up on each call, since FSDP and PEFT replace them
    backbone_outputs = model.base_model(*args, **kwargs)
    lm_head = model.get_output_embeddings()
    weight, bias = lm_head.weight, lm_head.bias
    hidden_states = backbone_outputs.last_hidden_state[:, :-1].to(weight.device)
    labels = labels[:, 1:].to(weight.device)
    mask = labels != -100
    grid = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
    first, second = (grid[positions.to(grid.device).unbind(1)] for positions in mixup[:2])
    mix_weights = torch.as_tensor(mixup[2], dtype=torch.float32, device=weight.device)
    if isinstance(weight, DTensor):  # FSDP2
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    with maybe_gather_lm_head_ctx(weight, bias):  # DeepSpeed ZeRO-3
        *per_row, mixed_log_probs = head(
            hidden_states.reshape(-1, hidden_states.size(-1)),
            weight,
            bias,
            labels.reshape(-1),
            first,
            second,
            mix_weights,
        )
    # Copied, since FSDP2 warns of views
    log_probs, entropy, is_top1 = (values.view(mask.shape).clone() for values in per_row)
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    aux_loss = None
    if kwargs.get("output_router_logits"):
        aux_loss = _load_balancing_loss(text_config, backbone_outputs.router_logits, kwargs.get("attention_mask"))
        loss = loss + getattr(text_config, "router_aux_loss_coef", 0.0) * aux_loss
    return PairedCausalLMOutput(
        loss=loss,
        log_probs=log_probs,
        entropy=entropy,
        is_top1=is_top1,
        label_mask=mask,
        aux_loss=aux_loss,
        mixed_log_probs=mixed_log_probs,
    )


def _load_balancing_loss(text_config, router_logits, attention_mask) -> torch.Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # as TRL, for every MoE family

    return load_balancing_loss_func(
        router_logits, text_config.num_experts, text_config.num_experts_per_tok, attention_mask
    )


@torch.compiler.disable
def paired_log_probs(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    mix_weights: torch.Tensor,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    tile_rows: int = TILE_ROWS,
    tile_vocab: int = TILE_VOCAB,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    Log-probabilities of labels, and of the labels of mixed hidden states ([SFTMix](https://huggingface.co/papers/2410.05248)).

    For a pair of rows with hidden states \\( z^c, z^u \\) and labels \\( y^c, y^u \\), and \\( \tilde p \\) the
    distribution that the head gives for \\( \lambda z^c + (1-\lambda) z^u \\), the mixed log-probability is

    $$ \lambda \log \tilde p(y^c) + (1-\lambda) \log \tilde p(y^u) $$

    The head is linear up to its soft-cap, so what the head makes of the mixture is the mixture of what it makes of the
    two rows, which are there anyway. Logits exist one tile at a time. In units of the product that makes all of them,
    a trained `weight` takes four products, as TRL's head does; a frozen one (LoRA, QLoRA) two, where TRL's takes
    three, and half of one for the mixtures. λ is a constant of the gradient. Softmax and sums are in float32, whatever
    the dtype of the product.

    Args:
        hidden_states (`torch.Tensor` of shape `(N, H)`):
            Last hidden states, after the final norm.
        weight (`torch.Tensor` of shape `(V, H)`):
            Weight of the LM head.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias of the LM head.
        labels (`torch.Tensor` of shape `(N,)`):
            Token that each row predicts (already shifted), `-100` for rows to leave out.
        first, second (`torch.Tensor` of shape `(P,)`, int64):
            Rows that are mixed, the n-th with the n-th. Each has a label and is in one pair at most.
        mix_weights (`torch.Tensor` of shape `(P,)`):
            Share λ of the first row of each pair, from 0 to 1.
        final_logit_softcapping (`float`, *optional*):
            The logits are `cap * tanh(logits / cap)`.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor of the logits, before the soft-cap.
        tile_rows, tile_vocab (`int`, *optional*):
            Size of a tile. Half of the rows of a tile are the partners of the other half.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]`: `log_probs`, `entropy`, `is_top1`, each of
        shape `(N,)` and zero where there is no label, and `mixed_log_probs` of shape `(P,)`; in nats. The
        log-probabilities have a gradient.

    Raises:
        `InputError`: If a row of a pair has no label or is in two pairs, or if the pairs' lengths differ.
    """
    if not len(first) == len(second) == len(mix_weights):
        raise InputError(f"Of {len(first)} pairs {len(second)} second rows and {len(mix_weights)} weights are given.")
    order = _order_rows(labels, first, second, max(tile_rows // 2, 1))
    device_type = hidden_states.device.type
    autocast = torch.is_autocast_enabled(device_type)
    plan = TilePlan(
        tiles=_make_tiles(len(order), len(first), max(tile_rows // 2, 1)),
        chunks=_slices(0, len(weight), tile_vocab),
        softcap=final_logit_softcapping,
        logit_scale=logit_scale,
        product_dtype=torch.get_autocast_dtype(device_type) if autocast else hidden_states.dtype,
    )
    *per_row, mixed_log_probs = PairedLogProbFunction.apply(
        hidden_states.index_select(0, order), weight, bias, labels[order], mix_weights.to(plan.value_dtype), plan
    )
    # `index_copy` keeps the output connected to the model even when there is no label
    per_row = (values.new_zeros(len(labels)).index_copy(0, order, values) for values in per_row)
    return *per_row, mixed_log_probs


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, stop)) for begin in range(start, stop, size)]


def _make_tiles(num_rows: int, num_pairs: int, pairs_per_tile: int) -> list[tuple[slice, slice]]:
    """Rows and pairs of each tile, for rows in the order of [`_order_rows`]."""
    paired = [(slice(2 * pairs.start, 2 * pairs.stop), pairs) for pairs in _slices(0, num_pairs, pairs_per_tile)]
    return paired + [(rows, slice(0, 0)) for rows in _slices(2 * num_pairs, num_rows, 2 * pairs_per_tile)]


def _order_rows(labels, first, second, pairs_per_tile: int) -> torch.Tensor:
    """The labelled rows: the firsts of a tile, their seconds, those of the next tile, and so on, then the unpaired."""
    is_labelled = labels != -100
    is_unpaired = is_labelled.clone()
    is_unpaired[first] = False
    is_unpaired[second] = False
    tiles = zip(first.split(pairs_per_tile), second.split(pairs_per_tile), strict=True)
    order = torch.cat([*(rows for tile in tiles for rows in tile), is_unpaired.nonzero().squeeze(1)])
    if len(order) != is_labelled.sum():
        raise InputError("A row of a pair has no label, or is in two pairs.")
    return order
