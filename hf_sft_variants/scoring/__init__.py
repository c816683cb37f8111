from ..base.example_keys import EXAMPLE_KEY, add_example_keys
from .cached_scores import cached_scores
from .log_probs import LogProbScorer, score_log_probs
from .reference_model import (
    identify_model,
    load_reference_model,
    load_reference_tokenizer,
    max_positions,
    refuse_zero3,
    require_same_vocabulary,
)
from .shards import find_scores, join_scores, read_scores, score_in_shards, scores_path


__all__ = [
    "EXAMPLE_KEY",
    "LogProbScorer",
    "add_example_keys",
    "cached_scores",
    "find_scores",
    "identify_model",
    "join_scores",
    "load_reference_model",
    "load_reference_tokenizer",
    "max_positions",
    "read_scores",
    "refuse_zero3",
    "require_same_vocabulary",
    "score_in_shards",
    "score_log_probs",
    "scores_path",
]
