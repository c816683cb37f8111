from ..base.example_keys import EXAMPLE_KEY
from .cached_scores import cached_scores
from .loading import load_model, load_tokenizer
from .log_probs import LogProbScorer, has_virtual_tokens, input_device
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
    "cached_scores",
    "describe_model",
    "has_virtual_tokens",
    "identify_model",
    "input_device",
    "load_model",
    "load_reference_model",
    "load_reference_tokenizer",
    "load_tokenizer",
    "max_positions",
    "refuse_zero3",
    "require_same_vocabulary",
]
