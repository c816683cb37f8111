"""Metrics of PoFT: means over examples, and the extremes and the effective sample size of τ."""

import torch
from accelerate import Accelerator

from ..base.batch import Ratio
from ..base.metrics import MetricSums
from .loss import PreferenceLoss


_TAU, _TAU_SQUARE = "poft/tau_mean", "poft/tau_square_mean"
_EXTREMES = {"poft/tau_min": torch.amin, "poft/tau_max": torch.amax}


def preference_metrics(result: PreferenceLoss, reference_names: list[str]) -> dict[str, Ratio]:
    """Metrics of a micro-batch as sums and numbers of examples; without references only the loss and r_θ."""
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
        _TAU: (result.tau.sum(), number),
        _TAU_SQUARE: (result.tau.square().sum(), number),
        "poft/tau_min": (result.tau.where(result.is_scored, torch.inf).amin(), 1),
        "poft/tau_max": (result.tau.where(result.is_scored, -torch.inf).amax(), 1),
    }


class PreferenceMetrics(MetricSums):
    """
    [`MetricSums`] that also keeps the minimum and the maximum of τ, and computes the effective sample size from the
    sums: (Σ τ)² / (n Σ τ²), the share of examples with equal weights that would carry as much information.
    """

    def __init__(self):
        super().__init__()
        self.extremes = {"train": {}, "eval": {}}

    def add(self, mode: str, metrics: dict[str, Ratio], accelerator: Accelerator) -> None:
        extremes = {name: metrics.pop(name)[0] for name in _EXTREMES if name in metrics}
        super().add(mode, metrics, accelerator)
        if not extremes:
            return
        gathered = accelerator.gather(torch.stack(list(extremes.values()))[None])
        for name, values in zip(extremes, gathered.unbind(dim=1), strict=True):
            before = self.extremes[mode].get(name, values[0])
            self.extremes[mode][name] = _EXTREMES[name](torch.cat([values, before[None]]))

    def take(self, mode: str) -> dict[str, float]:
        metrics = super().take(mode)
        square = metrics.pop(_TAU_SQUARE, 0)
        if square > 0:
            metrics["poft/effective_sample_size"] = metrics[_TAU] ** 2 / square
        extremes, self.extremes[mode] = self.extremes[mode], {}
        return {**metrics, **{name: value.item() for name, value in extremes.items() if value.isfinite()}}
