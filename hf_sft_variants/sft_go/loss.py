from dataclasses import dataclass

import torch


@dataclass
class GroupOptimization:
    """
    The SFT-GO loss of a micro-batch with its parts, for `X` segments (samples, or one micro-batch) and `K` groups.

    Attributes:
        loss_sum (`torch.Tensor`):
            Scalar; divide by the number of tokens or samples of the optimizer step.
        group_nll (`torch.Tensor` of shape `(X, K)`):
            Mean negative log-likelihood of each group, in nats per token; 0 where the group has no token. Detached.
        group_weight (`torch.Tensor` of shape `(X, K)`):
            Sum of the weights of each group's tokens.
        worst_group (`torch.Tensor` of shape `(X,)`):
            Id of the group with the highest loss; meaningless where `group_weight` is all zero.
    """

    loss_sum: torch.Tensor
    group_nll: torch.Tensor
    group_weight: torch.Tensor
    worst_group: torch.Tensor

    @property
    def has_several_groups(self) -> torch.Tensor:
        """Whether a segment has tokens of at least two groups; shape `(X,)`."""
        return (self.group_weight > 0).sum(dim=1) > 1


def group_optimization(
    log_probs: torch.Tensor,
    token_weights: torch.Tensor,
    group_ids: torch.Tensor,
    segment_ids: torch.Tensor,
    num_segments: int,
    worst_group_weight: float,
    chosen_group: int | None = None,
) -> GroupOptimization:
    r"""
    The SFT-GO loss: cross-entropy plus the loss of the worst group of each segment.

    With \\( l_t = -\log p_t \\), token weights \\( w_t \\), and \\( \bar l_S = \sum_{t \in S} w_t l_t / \sum_{t \in S}
    w_t \\) the weighted mean over a set of tokens:

    $$ \sum_x W_x \left[ (1-\lambda) \overline{l}_x + \lambda \max_g \overline{l}_{x,g} \right], \quad
    W_x = \sum_{t \in x} w_t $$

    over segments \\( x \\) and their groups \\( g \\) that have tokens. The gradient treats the choice of the worst
    group as a constant; of equal groups the first is taken. A segment without groups has plain cross-entropy.

    References:
        - SFT-GO: Supervised Fine-Tuning with Group Optimization: https://huggingface.co/papers/2506.15021. It fixes
          two groups in each sample, the sum of worst-group loss and cross-entropy, and λ = 0.9; how samples are
          weighted is our choice.

    Relations:
        - With \\( w_t = 1 \\) and λ = 0 this is the loss of [`~trl.SFTTrainer`].
        - With λ = 1, [`group_by_excess_loss`] and `chosen_group=1` it is Rho-1's.

    Args:
        log_probs (`torch.Tensor` of shape `(B, L)`):
            Log-probability of each label, float32, 0 where there is no label.
        token_weights (`torch.Tensor` of shape `(B, L)`):
            Weight of each label, 0 where there is no label.
        group_ids (`torch.Tensor` of shape `(B, L)`):
            Group of each label from 0, or `-1` for no group.
        segment_ids (`torch.Tensor` of shape `(B, L)`):
            Segment of each label, from 0 to `num_segments - 1`.
        num_segments (`int`):
            Number of segments, including those without labels.
        worst_group_weight (`float`):
            λ, in [0, 1].
        chosen_group (`int`, *optional*):
            Group to take instead of the one with the highest loss.

    Returns:
        [`GroupOptimization`].

    Example:

    ```python
    >>> log_probs = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    >>> groups, segments = torch.tensor([[0, 1]]), torch.tensor([[0, 0]])
    >>> group_optimization(log_probs, torch.ones(1, 2), groups, segments, 1, worst_group_weight=0.9).loss_sum
    tensor(5.8000, grad_fn=<AddBackward0>)
    ```
    """
    weighted_nll = -log_probs * token_weights
    num_groups = max(int(group_ids.max()) + 1 if group_ids.numel() else 0, 1, (chosen_group or 0) + 1)
    # One slot for each group of a segment, after one for its tokens in no group
    slots = (segment_ids * (num_groups + 1) + group_ids + 1).flatten()
    zeros = weighted_nll.new_zeros(num_segments * (num_groups + 1))
    weight = zeros.index_add(0, slots, token_weights.flatten()).view(num_segments, -1)
    nll_sum = zeros.index_add(0, slots, weighted_nll.flatten()).view(num_segments, -1)

    group_weight = weight[:, 1:]
    has_tokens = group_weight > 0
    group_nll = nll_sum[:, 1:] / group_weight.where(has_tokens, 1.0)
    worst_group = group_nll.detach().masked_fill(~has_tokens, -torch.inf).argmax(dim=1)
    taken_group = worst_group if chosen_group is None else torch.full_like(worst_group, chosen_group)
    taken_nll, is_there = (values.gather(1, taken_group[:, None]).squeeze(1) for values in (group_nll, has_tokens))

    worst_sum = torch.where(is_there, weight.sum(dim=1) * taken_nll, nll_sum.sum(dim=1))
    # The cross-entropy is summed as in SFTTrainer, so that λ = 0 gives its loss
    loss_sum = (1 - worst_group_weight) * weighted_nll.sum() + worst_group_weight * worst_sum.sum()
    return GroupOptimization(loss_sum, group_nll.detach(), group_weight, worst_group)


def uniform_token_weights(label_mask: torch.Tensor, sample_ids: torch.Tensor, num_samples: int) -> torch.Tensor:
    """
    Token weights that sum to 1 for every sample: one over the number of its labels.

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
