"""Log-probabilities of a data set under the reference model of `group_by="rho1"`, scored once and cached."""

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..base.preparation import keep_scorable
from ..scoring import (
    LogProbScorer,
    cached_scores,
    identify_model,
    load_reference_model,
    max_positions,
    require_same_vocabulary,
)
from .config import SFTGOConfig


def drop_too_long(dataset: Dataset, args: SFTGOConfig, dataset_name: str) -> Dataset:
    """
    Drop and count the examples that have more tokens than the reference model can read. Raises an `InputError` if none
    is left.
    """
    limit = max_positions(args.reference_model, args.reference_model_init_kwargs)
    if limit is None:
        return dataset
    fits = [len(ids) <= limit for ids in dataset["input_ids"]]
    return keep_scorable(dataset, {args.reference_model: fits}, dataset_name)


def reference_log_probs(
    dataset: Dataset, args: SFTGOConfig, tokenizer: PreTrainedTokenizerBase, dataset_name: str
) -> pa.ChunkedArray:
    """
    Score a prepared data set with the reference model, or read the scores from the cache: for each example a list of
    floats, one for each token of `input_ids`; null without labels. Must be called by all processes. Raises an
    `InputError` if the reference model has another vocabulary.
    """
    options = args.reference_model_init_kwargs
    require_same_vocabulary(args.reference_model, tokenizer, options)
    settings = {"kind": "log_probs", **identify_model(args.reference_model, options)}

    def load_scorer():
        return LogProbScorer(load_reference_model(args.reference_model, options), per_token=True)

    description = f"Scoring {dataset_name} dataset with {args.reference_model}"
    scores = cached_scores(dataset, load_scorer, args.score_cache_dir, settings, args.score_batch_tokens, description)
    return scores["token_log_probs"]
