import torch

from .grouping import IMPORTANT, UNGROUPED


@torch.no_grad()
def group_by_excess_loss(
    log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor,
    group_ids: torch.Tensor,
    segment_ids: torch.Tensor,
    num_segments: int,
    important_fraction: float,
) -> torch.Tensor:
    r"""
    Group tokens by how much worse the model is at them than a reference model.

    The tokens of a segment (a sample, or the micro-batch) with the highest excess loss

    $$ \log p_\text{reference}(t) - \log p(t) $$

    are important: `round(η·n)` of its `n` grouped tokens, at least 1 and at most `n - 1`, ties by position.

    References:
        - Rho-1: Not All Tokens Are What You Need: https://huggingface.co/papers/2404.07965

    Requirements:
        1. Log-probabilities of the data set under a reference model with the same vocabulary.

    Args:
        log_probs (`torch.Tensor` of shape `(B, L)`):
            Log-probability of each label under the model.
        reference_log_probs (`torch.Tensor` of shape `(B, L)`):
            The same under the reference model.
        group_ids (`torch.Tensor` of shape `(B, L)`):
            `-1` for tokens that are not grouped, 1 for those that rank before all others, 0 for the rest.
        segment_ids (`torch.Tensor` of shape `(B, L)`):
            Segment of each token, from 0 to `num_segments - 1`.
        num_segments (`int`):
            Number of segments.
        important_fraction (`float`):
            η, in (0, 1).

    Returns:
        `torch.Tensor` of shape `(B, L)`: 1 important, 0 unimportant, -1 not grouped.
    """
    grouped = (group_ids != UNGROUPED).flatten()
    excess_loss = (reference_log_probs - log_probs).flatten()[grouped]
    segments = segment_ids.flatten()[grouped]
    ranks_last = (group_ids != IMPORTANT).flatten()[grouped]

    # Stable sorts, by the least important key first, leave equal keys in the order of their positions
    order = torch.argsort(excess_loss, descending=True, stable=True)
    order = order[torch.argsort(ranks_last[order].long(), stable=True)]
    order = order[torch.argsort(segments[order], stable=True)]
    num_tokens = torch.bincount(segments, minlength=num_segments)
    first = num_tokens.cumsum(0) - num_tokens
    rank = torch.arange(len(order), device=order.device) - first[segments[order]]

    num_important = torch.round(important_fraction * num_tokens.double()).long().clamp(min=1)
    num_important = torch.minimum(num_important, num_tokens - 1)
    result = torch.full_like(group_ids, UNGROUPED)
    important = torch.empty_like(rank)
    important[order] = (rank < num_important[segments[order]]).long()
    result.view(-1)[grouped] = important
    return result
