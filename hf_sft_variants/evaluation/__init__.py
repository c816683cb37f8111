"""Evaluation on held-out rows: likelihood of completions and accuracy of generated answers."""

from .generation import generate_answers
from .held_out import check_dataset, check_tagged_dataset, held_out_nll, held_out_nll_of_rows
from .scores import exact_match, last_number_match, numeric_answers, tagged_scores


__all__ = [
    "check_dataset",
    "check_tagged_dataset",
    "exact_match",
    "generate_answers",
    "held_out_nll",
    "held_out_nll_of_rows",
    "last_number_match",
    "numeric_answers",
    "tagged_scores",
]
