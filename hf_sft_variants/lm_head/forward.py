"""Adds the LM head to a model's forward."""

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import InputError
from .log_probs import LabelLogProbs, label_log_probs
from .sharded import gathered, whole


# What model families call the soft-cap and the scale of the logits in their configurations
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")


@dataclass
class LabelledOutput(ModelOutput):
    """
    Output of a model with [`add_lm_head`] called with `score_labels=True`.

    All fields but the last two have a value for each next-token prediction, zero where there is no label. `L` is one
    less than the number of positions.

    Attributes:
        log_probs (`torch.Tensor` of shape `(B, L)`):
            Log-probability of each label in nats.
        entropy (`torch.Tensor` of shape `(B, L)`):
            Entropy of each next-token distribution, without a gradient.
        is_top1 (`torch.Tensor` of shape `(B, L)`):
            Whether the label is the most likely next token.
        label_mask (`torch.Tensor` of shape `(B, L)`):
            Whether there is a label.
        mixed_log_probs (`torch.Tensor` of shape `(P,)`, *optional*):
            Of each mixture, see [`label_log_probs`].
        aux_loss (`torch.Tensor`, *optional*):
            Load-balancing loss of a mixture of experts, when called with `output_router_logits=True`.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    mixed_log_probs: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def add_lm_head(model: PreTrainedModel) -> None:
    """
    Add a forward to a causal language model that returns log-probabilities of labels instead of logits.

    `model(..., labels=labels, score_labels=True)` returns a [`LabelledOutput`]. Without `score_labels`, it
    returns what it did before. Three more arguments mix pairs of positions as [`label_log_probs`] does:

    - **mixup_first**, **mixup_second** (`torch.Tensor` of shape `(P, 2)`, int64): the positions that are mixed, the
      n-th with the n-th, each `(row, column)` of the grid of predictions, with the column counted from the end of the
      row: the last prediction is `-1`. So it stays right when prompt learning prepends virtual tokens.
    - **mixup_weights** (`torch.Tensor` or `list[float]` of length `P`): λ, the share of the first of each pair. A list
      stays in float32 where FSDP or DeepSpeed casts every floating-point tensor to the model's dtype.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, not wrapped with PEFT (`model.get_base_model()`).

    Raises:
        `InputError`: If the head has an adapter or is quantized: its weight alone would not be what it computes.
    """
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer) or not head.weight.is_floating_point():
        raise InputError(
            f"The LM head of {type(model).__name__} has an adapter or is quantized (`{type(head).__name__}`), but its "
            "weight is used without that. Remove it from the adapter's `target_modules` (`modules_to_save` trains it "
            "whole), or from what is quantized."
        )
    forward_before = model.forward
    if getattr(forward_before, "scores_labels", False):
        return

    @torch.compiler.disable(recursive=False)
    @functools.wraps(type(model).forward)  # keeps the signature, which `generate` looks at
    def forward(
        self, *args, score_labels=False, mixup_first=None, mixup_second=None, mixup_weights=None, labels=None, **kwargs
    ):
        if score_labels:
            return _score_labels(self, labels, (mixup_first, mixup_second, mixup_weights), args, kwargs)
        if labels is not None:
            kwargs["labels"] = labels
        return forward_before(*args, **kwargs)

    forward.scores_labels = True
    model.forward = types.MethodType(forward, model)


@torch.compiler.disable(recursive=False)
def _score_labels(model, labels, mixup, args, kwargs) -> LabelledOutput:
    text_config = model.config.get_text_config()
    if getattr(text_config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    # Backbone and head are looked up on each call, since FSDP and PEFT replace them
    backbone_outputs = model.base_model(*args, **{**kwargs, "use_cache": False})
    head = model.get_output_embeddings()
    # A model that is split across devices may have its head on another device than its last layer
    hidden_states = backbone_outputs.last_hidden_state.to(head.weight.device)
    labels = F.pad(labels[:, 1:], (0, 1), value=-100).to(head.weight.device)  # nothing follows the last token
    scores = head_log_probs(head, text_config, hidden_states, labels, *mixup)
    # Copied, because FSDP2 warns about views
    *grids, label_mask = (grid.view(labels.shape)[:, :-1].clone() for grid in (*scores[:3], labels != -100))
    aux_loss = None
    if kwargs.get("output_router_logits"):
        attention_mask = kwargs.get("attention_mask")
        aux_loss = _load_balancing_loss(model, text_config, backbone_outputs.router_logits, attention_mask)
    mixed_log_probs = None if mixup[0] is None else scores.mixed_log_probs
    return LabelledOutput(*grids, label_mask, mixed_log_probs, aux_loss)


@torch.compiler.disable
def head_log_probs(
    head: torch.nn.Module,
    text_config: PretrainedConfig,
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    mixup_first: torch.Tensor | None = None,
    mixup_second: torch.Tensor | None = None,
    mixup_weights: torch.Tensor | list[float] | None = None,
) -> LabelLogProbs:
    """
    [`label_log_probs`] of a batch under a model's LM head, whose parameters may be sharded.

    Args:
        head (`torch.nn.Module`):
            The LM head.
        text_config ([`~transformers.PretrainedConfig`]):
            Configuration of the model.
        hidden_states (`torch.Tensor` of shape `(B, T, H)`):
            Last hidden states.
        labels (`torch.Tensor` of shape `(B, T)`):
            Token that each position predicts (already shifted), `-100` for positions to leave out.
        mixup_first, mixup_second, mixup_weights:
            As in [`add_lm_head`].
    """
    pairs = {}
    if mixup_first is not None:
        grid = torch.arange(labels.numel(), device=labels.device).view(labels.shape)[:, :-1]
        first, second = (grid[positions.to(grid.device).unbind(1)] for positions in (mixup_first, mixup_second))
        mix_weights = torch.as_tensor(mixup_weights, dtype=torch.float32, device=labels.device)
        pairs = {"first": first, "second": second, "mix_weights": mix_weights}
    weight, bias = whole(head.weight), whole(getattr(head, "bias", None))
    with gathered(weight, bias):
        return label_log_probs(
            hidden_states.flatten(0, 1), weight, bias, labels.flatten(), **pairs, **head_settings(text_config)
        )


def head_settings(text_config: PretrainedConfig) -> dict[str, Any]:
    """`softcap` and `scale` of a model's logits."""
    softcaps = (getattr(text_config, name, None) for name in SOFTCAPS)
    scales = (getattr(text_config, name, None) for name in SCALES)
    scale = next((scale for scale in scales if scale is not None), 1.0)
    divisor = getattr(text_config, "logits_scaling", None)
    if divisor is not None:
        scale = divisor if text_config.model_type == "hyperclovax" else 1 / divisor  # HyperCLOVA X multiplies
    return {"softcap": next((softcap for softcap in softcaps if softcap is not None), None), "scale": scale}


def _load_balancing_loss(model, text_config, router_logits, attention_mask) -> torch.Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # all MoE families use it

    num_experts = getattr(text_config, "num_experts", None) or model.num_experts  # the model has it in older versions
    return load_balancing_loss_func(router_logits, num_experts, text_config.num_experts_per_tok, attention_mask)
