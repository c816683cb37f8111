from ..base.example_keys import EXAMPLE_KEY, add_example_keys
from .log_probs import LogProbScorer, score_log_probs
from .reference_model import identify_model, load_reference_model
from .shards import find_scores, join_scores, read_scores, score_in_shards, scores_path


__all__ = [
    "EXAMPLE_KEY",
    "LogProbScorer",
    "add_example_keys",
    "find_scores",
    "identify_model",
    "join_scores",
    "load_reference_model",
    "read_scores",
    "score_in_shards",
    "score_log_probs",
    "scores_path",
]
