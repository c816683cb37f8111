"""Metrics of groups: their losses, which one is the worst, and how often that changes."""

import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from .grouping import IMPORTANT, MAX_GROUPS
from .loss import GroupOptimization


Ratios = dict[str, tuple[torch.Tensor | float, torch.Tensor | float]]


def group_metrics(result: GroupOptimization, own_ids: bool) -> Ratios:
    """
    Mean loss of each group, and share of the segments in which it is the worst, as numerators and denominators.

    Groups are named `group_0`, `group_1` and so on for the user's `own_ids`, otherwise `unimportant` and `important`.
    The names are the same whatever groups the micro-batch has, because all processes have to log the same.
    """
    names = [f"group_{group}" for group in range(MAX_GROUPS)] if own_ids else ["unimportant", "important"]
    missing = len(names) - result.group_weight.size(1)
    weight, nll = (F.pad(values, (0, missing)) for values in (result.group_weight, result.group_nll))
    groups = torch.arange(len(names), device=weight.device)
    compared = result.has_several_groups[:, None] & (weight > 0)
    is_worst = compared & (result.worst_group[:, None] == groups)
    sums = [(weight * nll).sum(0), weight.sum(0), is_worst.sum(0), compared.sum(0)]
    metrics = {}
    for group, (nll_sum, weight_sum, num_worst, num_compared) in enumerate(zip(*sums, strict=True)):
        metrics[f"sft_go/{names[group]}_nll"] = (nll_sum, weight_sum)
        if own_ids or group == IMPORTANT:
            metrics[f"sft_go/{names[group]}_is_worst"] = (num_worst, num_compared)
    return metrics


class WorstGroupFlips(TrainerCallback):
    """
    Counts samples whose worst group has changed since this process last saw them, so none in the first epoch.
    """

    def __init__(self):
        self.last_worst_group: dict[int, int] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.last_worst_group.clear()

    def update(
        self, result: GroupOptimization, example_numbers: torch.Tensor, sample_ids: torch.Tensor
    ) -> tuple[int, int]:
        """
        Count the flipped samples and the samples seen before in a micro-batch whose segments are samples.
        `example_numbers` has the number of each token's example in the data set, `-1` on padding.
        """
        numbers = torch.full_like(result.worst_group, -1)
        numbers.scatter_reduce_(0, sample_ids.flatten(), example_numbers.flatten(), "amax")
        flipped = seen = 0
        compared = torch.stack([numbers, result.worst_group], dim=1)[result.has_several_groups]
        for number, worst_group in compared.tolist():
            if number in self.last_worst_group:
                seen += 1
                flipped += worst_group != self.last_worst_group[number]
            self.last_worst_group[number] = worst_group
        return flipped, seen
