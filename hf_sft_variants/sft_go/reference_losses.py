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
    Drop the examples that have more tokens than the reference model can read, and count them.

    Raises:
        `InputError`: If none is left.
    """
    limit = max_positions(args.reference_model, args.reference_model_init_kwargs)
    if limit is None:
        return dataset
    return keep_scorable(
        dataset, {args.reference_model: [len(ids) <= limit for ids in dataset["input_ids"]]}, dataset_name
    )


def reference_log_probs(
    dataset: Dataset, args: SFTGOConfig, tokenizer: PreTrainedTokenizerBase, dataset_name: str
) -> pa.ChunkedArray:
    """
    Score a prepared data set under the reference model, or find the scores on disk.

    Args:
        dataset ([`~datasets.Dataset`]):
            Examples with `input_ids` and `labels`.
        args ([`SFTGOConfig`]):
            Names the reference model and the cache.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The trained model's tokenizer.
        dataset_name (`str`):
            Name of the data set, for the progress bar.

    Returns:
        `pa.ChunkedArray`: For each example a list of float, one for each token of `input_ids`; null without labels.

    Raises:
        `InputError`: If the reference model has another vocabulary or can't be loaded.
    """
    require_same_vocabulary(args.reference_model, tokenizer, args.reference_model_init_kwargs)
    settings = {
        "kind": "log_probs",
        **identify_model(args.reference_model, args.reference_model_init_kwargs),
    }

    def load_scorer():
        model = load_reference_model(args.reference_model, args.reference_model_init_kwargs)
        return LogProbScorer(model, per_token=True)

    description = f"Scoring {dataset_name} dataset with {args.reference_model}"
    scores = cached_scores(dataset, load_scorer, args.score_cache_dir, settings, args.score_batch_tokens, description)
    return scores["token_log_probs"]
