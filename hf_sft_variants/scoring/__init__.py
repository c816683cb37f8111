from ..base.example_keys import EXAMPLE_KEY, add_example_keys
from .cached_scores import cached_scores
from .log_probs import LogProbScorer
from .reference_model import (
    describe_model,
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
    "add_example_keys",
    "cached_scores",
    "describe_model",
    "identify_model",
    "load_reference_model",
    "load_reference_tokenizer",
    "max_positions",
    "refuse_zero3",
    "require_same_vocabulary",
]
