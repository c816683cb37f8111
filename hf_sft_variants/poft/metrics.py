"""The metrics that PoFT logs: means over examples, and the extremes and the effective sample size of τ."""

from typing import NamedTuple

import torch

from ..base.metrics import Maximum, Minimum
from .loss import PreferenceLoss


class EffectiveSampleSize(NamedTuple):
    """(Σ τ)² / (n Σ τ²): the share of the examples that would weigh as much if all weighed the same."""

    tau_sum: torch.Tensor | float
    square_sum: torch.Tensor | float
    number: torch.Tensor | float
    combine = torch.sum

    def value(self) -> float | None:
        return self.tau_sum**2 / (self.number * self.square_sum) if self.square_sum > 0 else None


def preference_metrics(result: PreferenceLoss, reference_names: list[str]) -> dict[str, tuple]:
    """The metrics of a micro-batch as sums and numbers of examples; without references, loss and r_θ alone."""
    number = result.is_scored.sum()
    metrics = {"poft/loss": (result.loss_sum.detach(), number), "poft/r_theta": (result.log_prob.sum(), number)}
    if not reference_names:
        return metrics
    reference_mean = result.reference_log_probs.mean(dim=0)
    for name, values in zip(reference_names, result.reference_log_probs, strict=True):
        metrics[f"poft/reference_{name}"] = (values.sum(), number)
    wins = (result.log_prob > reference_mean) & result.is_scored
    return {
        **metrics,
        "poft/reference_mean": (reference_mean.sum(), number),
        "poft/margin": ((result.log_prob - reference_mean).sum(), number),
        "poft/win_rate": (wins.sum(), number),
        "poft/tau_mean": (result.tau.sum(), number),
        "poft/tau_min": Minimum(result.tau.where(result.is_scored, torch.inf).amin()),
        "poft/tau_max": Maximum(result.tau.where(result.is_scored, -torch.inf).amax()),
        "poft/effective_sample_size": EffectiveSampleSize(result.tau.sum(), result.tau.square().sum(), number),
    }
