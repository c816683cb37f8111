from dataclasses import dataclass

import torch


@dataclass
class GroupOptimization:
    """
    The SFT-GO loss of a micro-batch and what it was made of. `X` scopes (samples, or one micro-batch), `K` groups.

    Attributes:
        loss_sum (`torch.Tensor`):
            Scalar; divide by the number of tokens or samples of the optimizer step.
        group_nll (`torch.Tensor` of shape `(X, K)`):
            Mean negative log-likelihood of each group, in nats per token; 0 where the group has no token. Detached.
        group_weight (`torch.Tensor` of shape `(X, K)`):
            Summed weight of each group's tokens.
        worst_group (`torch.Tensor` of shape `(X,)`):
            Id of the group with the highest loss; meaningless where `group_weight` is all zero.
    """

    loss_sum: torch.Tensor
    group_nll: torch.Tensor
    group_weight: torch.Tensor
    worst_group: torch.Tensor

    @property
    def has_several_groups(self) -> torch.Tensor:
        """Whether a scope has tokens of at least two groups; shape `(X,)`."""
        return (self.group_weight > 0).sum(dim=1) > 1


def group_optimization(
    log_probs: torch.Tensor,
    token_weights: torch.Tensor,
    group_ids: torch.Tensor,
    scope_ids: torch.Tensor,
    num_scopes: int,
    worst_group_weight: float,
    chosen_group: int | None = None,
) -> GroupOptimization:
    r"""
    Cross-entropy plus the loss of the worst group ([SFT-GO](https://huggingface.co/papers/2506.15021)).

    With \\( l_t = -\log p_t \\), token weights \\( w_t \\), and \\( \bar l_S = \sum_{t \in S} w_t l_t / \sum_{t \in S}
    w_t \\) the weighted mean over a set of tokens:

    $$ \sum_x W_x \left[ (1-\lambda) \overline{l}_x + \lambda \max_g \overline{l}_{x,g} \right], \quad
    W_x = \sum_{t \in x} w_t $$

    over scopes \\( x \\) and their groups \\( g \\) that have tokens. A scope without groups has plain cross-entropy.
    The choice of the worst group is a constant of the gradient; of equal groups the first is taken. The paper fixes
    two groups in each sample, the combination of worst-group loss and cross-entropy, and λ = 0.9; the weights by which
    samples are combined are ours: with \\( w_t = 1 \\) and λ = 0 this is the ordinary cross-entropy.

    Args:
        log_probs (`torch.Tensor` of shape `(B, L)`):
            Log-probability of each label, float32, 0 where there is none.
        token_weights (`torch.Tensor` of shape `(B, L)`):
            Weight of each label, 0 where there is none.
        group_ids (`torch.Tensor` of shape `(B, L)`):
            Group of each label from 0, or `-1` for no group.
        scope_ids (`torch.Tensor` of shape `(B, L)`):
            Scope of each label, from 0 to `num_scopes - 1`.
        num_scopes (`int`):
            Number of scopes, those without labels included.
        worst_group_weight (`float`):
            λ, in [0, 1].
        chosen_group (`int`, *optional*):
            Group to take in place of the one with the highest loss.

    Returns:
        [`GroupOptimization`].
    """
    weighted_nll = -log_probs * token_weights
    num_groups = max(int(group_ids.max()) + 1 if group_ids.numel() else 0, 1, (chosen_group or 0) + 1)
    # One slot for each group of each scope, and one more for its tokens in no group
    slots = (scope_ids * (num_groups + 1) + group_ids + 1).flatten()
    zeros = weighted_nll.new_zeros(num_scopes * (num_groups + 1))
    weight = zeros.index_add(0, slots, token_weights.flatten()).view(num_scopes, -1)
    nll_sum = zeros.index_add(0, slots, weighted_nll.flatten()).view(num_scopes, -1)

    group_weight = weight[:, 1:]
    has_tokens = group_weight > 0
    group_nll = nll_sum[:, 1:] / group_weight.where(has_tokens, torch.ones_like(group_weight))
    worst_group = group_nll.detach().masked_fill(~has_tokens, -torch.inf).argmax(dim=1)
    taken_group = worst_group if chosen_group is None else torch.full_like(worst_group, chosen_group)
    taken_nll, is_there = (values.gather(1, taken_group[:, None]).squeeze(1) for values in (group_nll, has_tokens))

    worst_sum = torch.where(is_there, weight.sum(dim=1) * taken_nll, nll_sum.sum(dim=1))
    # The cross-entropy is summed as SFTTrainer sums it: λ = 0 then gives its loss to the last bit
    loss_sum = (1 - worst_group_weight) * weighted_nll.sum() + worst_group_weight * worst_sum.sum()
    return GroupOptimization(loss_sum, group_nll.detach(), group_weight, worst_group)


def uniform_token_weights(label_mask: torch.Tensor, sample_ids: torch.Tensor, num_samples: int) -> torch.Tensor:
    """
    Weights that make every sample weigh 1: one over the number of its labels.

    Args:
        label_mask (`torch.Tensor` of shape `(B, L)`):
            Where there is a label.
        sample_ids (`torch.Tensor` of shape `(B, L)`):
            Sample of each position, from 0 to `num_samples - 1`.
        num_samples (`int`):
            Number of samples.

    Returns:
        `torch.Tensor` of shape `(B, L)`, float32, 0 where there is no label.
    """
    mask = label_mask.float()
    num_labels = mask.new_zeros(num_samples).index_add(0, sample_ids.flatten(), mask.flatten())
    return mask / num_labels.clamp(min=1)[sample_ids]
