from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..base.metrics import Maximum, Minimum


@dataclass
class PreferenceLoss:
    """
    PoFT loss of a micro-batch of `S` examples with `M` reference models, and its parts: these are detached, and zero
    for an example without scored tokens.

    Attributes:
        loss_sum (`torch.Tensor`): Scalar; divide by the number of scored examples of the optimizer step.
        is_scored (`torch.Tensor` of shape `(S,)`): Whether an example has a scored token.
        log_prob (`torch.Tensor` of shape `(S,)`): r_θ, mean log-probability of the scored tokens, in nats.
        reference_log_probs (`torch.Tensor` of shape `(M, S)`): r_j of each reference model, in nats.
        tau (`torch.Tensor` of shape `(S,)`): τ, the weight of the example's cross-entropy in the gradient (times β).
    """

    loss_sum: torch.Tensor
    is_scored: torch.Tensor
    log_prob: torch.Tensor
    reference_log_probs: torch.Tensor
    tau: torch.Tensor

    def metrics(self, reference_names: list[str]) -> dict[str, tuple]:
        """What is logged, as sums and numbers of examples; without references, loss and r_θ alone."""
        number = self.is_scored.sum()
        metrics = {"poft/loss": (self.loss_sum.detach(), number), "poft/r_theta": (self.log_prob.sum(), number)}
        if not reference_names:
            return metrics
        reference_mean = self.reference_log_probs.mean(dim=0)
        for name, values in zip(reference_names, self.reference_log_probs, strict=True):
            metrics[f"poft/reference_{name}"] = (values.sum(), number)
        wins = (self.log_prob > reference_mean) & self.is_scored
        return {
            **metrics,
            "poft/reference_mean": (reference_mean.sum(), number),
            "poft/margin": ((self.log_prob - reference_mean).sum(), number),
            "poft/win_rate": (wins.sum(), number),
            "poft/tau_mean": (self.tau.sum(), number),
            "poft/tau_min": Minimum(self.tau.where(self.is_scored, torch.inf).amin()),
            "poft/tau_max": Maximum(self.tau.where(self.is_scored, -torch.inf).amax()),
            "poft/effective_sample_size": EffectiveSampleSize(self.tau.sum(), self.tau.square().sum(), number),
        }


class EffectiveSampleSize(NamedTuple):
    """(Σ τ)² / (n Σ τ²): the share of the examples that would weigh as much if all weighed the same."""

    tau_sum: torch.Tensor | float
    square_sum: torch.Tensor | float
    number: torch.Tensor | float

    @property
    def combine(self) -> Callable[..., torch.Tensor]:
        return torch.sum

    def value(self) -> float | None:
        return float(self.tau_sum**2 / (self.number * self.square_sum)) if self.square_sum > 0 else None


def preference_loss(
    log_probs: torch.Tensor,
    scored_mask: torch.Tensor,
    sample_ids: torch.Tensor,
    num_samples: int,
    reference_log_probs: torch.Tensor,
    beta: float,
    gamma: float,
    weighting: str,
) -> PreferenceLoss:
    r"""
    Preference of the target model over the mean of the reference models.

    $$ \sum_x -\log \sigma(\beta (r_\theta(x) - \overline{r}(x)) + \gamma), \quad
    \overline{r} = \frac{1}{M} \sum_j r_j $$

    Its gradient is \\( \beta \tau \\) times that of the example's mean negative log-likelihood, with \\( \tau =
    \sigma(-(\beta (r_\theta - \overline{r}) + \gamma)) \\). The control `"uniform"` is \\( \sum_x -r_\theta(x) \\);
    `"constant"` is \\( \beta \sigma(-\gamma) \\) times that, the weight of an example with \\( r_\theta =
    \overline{r} \\).

    References:
        - [Preference-Oriented Supervised Fine-Tuning](https://huggingface.co/papers/2412.12865), Eqs. 3 to 9.

    Requirements:
        1. Reference log-probabilities of the same text, each in nats per token of its model.

    Relations:
        - With `weighting="uniform"` and one example, the mean cross-entropy of [`~trl.SFTTrainer`].

    Args:
        log_probs (`torch.Tensor` of shape `(B, L)`): Log-probability of each label, float32.
        scored_mask (`torch.Tensor` of shape `(B, L)`): Which labels are scored, boolean.
        sample_ids (`torch.Tensor` of shape `(B, L)`): Example of each label, from 0 to `num_samples - 1`.
        num_samples (`int`): Number of examples `S`, those without labels included.
        reference_log_probs (`torch.Tensor` of shape `(M, B, L)`): r_j, the same on all labels of an example.
        beta (`float`): β, positive.
        gamma (`float`): γ.
        weighting (`str`): `"poft"`, `"uniform"` or `"constant"`.
    """
    examples, mask = sample_ids.flatten(), scored_mask.flatten()
    zeros = log_probs.new_zeros(num_samples)
    num_scored = zeros.index_add(0, examples, mask.to(zeros.dtype))
    is_scored = num_scored > 0
    log_prob = zeros.index_add(0, examples, log_probs.flatten() * mask) / num_scored.clamp(min=1)
    # All values of an example are equal: take one, since a mean would round
    values = reference_log_probs.flatten(1).masked_fill(~mask, -torch.inf)
    lowest = values.new_full((len(values), num_samples), -torch.inf)
    references = lowest.scatter_reduce(1, examples.expand_as(values), values, "amax").masked_fill(~is_scored, 0.0)

    if weighting == "poft":
        logits = beta * (log_prob - references.mean(dim=0)) + gamma
        loss, tau = -F.logsigmoid(logits), torch.sigmoid(-logits.detach())
    else:
        tau = torch.ones_like(zeros) if weighting == "uniform" else torch.sigmoid(zeros - gamma)
        loss = -log_prob * (tau if weighting == "uniform" else beta * tau)
    return PreferenceLoss((loss * is_scored).sum(), is_scored, log_prob.detach(), references, tau * is_scored)
