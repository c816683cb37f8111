"""How likely the recipe's starting model finds each token in the loss."""

import math
from itertools import chain
from typing import Any

from tqdm import tqdm

from ..launch.loading import usable_device
from ..launch.preparation import Recipe
from ..launch.training import model_options
from ..scoring import LogProbScorer, load_model
from .rows import Column, View


PROBABILITY = "probability"


def starting_model_options(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments that training would load the model with."""
    args = recipe.training_args
    return model_options(recipe.model_args, args.trust_remote_code) | (args.model_init_kwargs or {})


def add_probabilities(view: View, model: str, options: dict[str, Any]) -> None:
    """
    Add the score `probability` to a view: of each token in the loss, given those before it. The model is loaded on the
    accelerator if there is one.
    """
    score = LogProbScorer(load_model(model, options, usable_device(None), what="`model_name_or_path`"), per_token=True)
    for row in tqdm(view.rows, desc="Scoring rows"):
        results = [score([example])[0] for example in row.examples()]
        log_probs = chain.from_iterable(result["token_log_probs"].tolist() for result in results)
        row.values[PROBABILITY] = [
            math.exp(log_prob) if in_loss else 0.0 for log_prob, in_loss in zip(log_probs, row.in_loss(), strict=True)
        ]
    view.columns.append(Column(PROBABILITY, "score"))


def reading(view: View) -> str | None:
    """The mean probability in words; `None` if there are no probabilities."""
    column = next((column for column in view.columns if column.name == PROBABILITY), None)
    values = [value for row in view.rows for value in row.values_in_loss(column)] if column else []
    if not values:
        return None
    mean = sum(values) / len(values)
    return (
        f"Mean probability of {len(values):,} tokens in the loss under the starting model: {mean:.2f}. According to "
        "arXiv 2510.00526 (that paper's finding, not ours), above about 0.5 objectives that trust the model, such as "
        "DFT or `group_by: rho1`, tend to help; below about 0.1 plain negative log-likelihood does."
    )
