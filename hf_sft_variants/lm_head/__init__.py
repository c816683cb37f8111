"""One LM head for every method: log-probabilities of labels, single and mixed, computed in tiles of the vocabulary."""

from .log_probs import LabelLogProbs, label_log_probs


__all__ = ["LabelLogProbs", "label_log_probs"]
