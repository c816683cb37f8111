import torch

from .grouping import IMPORTANT, UNGROUPED


@torch.no_grad()
def group_by_excess_loss(
    log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor,
    group_ids: torch.Tensor,
    scope_ids: torch.Tensor,
    num_scopes: int,
    important_fraction: float,
) -> torch.Tensor:
    """
    Group tokens by how much worse the model is at them than a reference model, as
    [Rho-1](https://huggingface.co/papers/2404.07965) selects them: the share η with the highest excess loss, current
    loss minus the reference model's, is important. Exactly `round(η·n)` of the `n` grouped tokens of each scope, at
    least 1 and at most `n - 1`; of equal ones the earlier position.

    Args:
        log_probs (`torch.Tensor` of shape `(B, L)`):
            Log-probability of each label under the model.
        reference_log_probs (`torch.Tensor` of shape `(B, L)`):
            The same under the reference model.
        group_ids (`torch.Tensor` of shape `(B, L)`):
            `-1` for tokens that are not grouped, 1 for those that rank before all others, 0 for the rest.
        scope_ids (`torch.Tensor` of shape `(B, L)`):
            Scope of each token, from 0 to `num_scopes - 1`.
        num_scopes (`int`):
            Number of scopes.
        important_fraction (`float`):
            η, in (0, 1).

    Returns:
        `torch.Tensor` of shape `(B, L)`: 1 important, 0 unimportant, -1 not grouped.
    """
    grouped = (group_ids != UNGROUPED).flatten()
    excess_loss = (reference_log_probs - log_probs).flatten()[grouped]
    scopes = scope_ids.flatten()[grouped]
    ranks_last = (group_ids != IMPORTANT).flatten()[grouped]

    # Stable sorts by the least important key first; positions keep their order within equal keys
    order = torch.argsort(excess_loss, descending=True, stable=True)
    order = order[torch.argsort(ranks_last[order].long(), stable=True)]
    order = order[torch.argsort(scopes[order], stable=True)]
    num_tokens = torch.bincount(scopes, minlength=num_scopes)
    first = num_tokens.cumsum(0) - num_tokens
    rank = torch.arange(len(order), device=order.device) - first[scopes[order]]

    num_important = torch.round(important_fraction * num_tokens.double()).long().clamp(min=1)
    num_important = torch.minimum(num_important, num_tokens - 1)
    important = torch.empty_like(rank)
    important[order] = (rank < num_important[scopes[order]]).long()
    result = torch.full_like(group_ids, UNGROUPED)
    result.view(-1)[grouped] = important
    return result
