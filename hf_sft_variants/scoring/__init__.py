from ..base.example_keys import EXAMPLE_KEY
from .cached_scores import cached_scores
from .log_probs import LogProbScorer
from .reference_model import (
    identify_model,
    load_reference_model,
    load_reference_tokenizer,
    max_positions,
    refuse_zero3,
    require_same_vocabulary,
)


__all__ = [
    "EXAMPLE_KEY",
    "LogProbScorer",
    "cached_scores",
    "identify_model",
    "load_reference_model",
    "load_reference_tokenizer",
    "max_positions",
    "refuse_zero3",
    "require_same_vocabulary",
]
