"""Log-probabilities of a data set under the reference model of `group_by="rho1"`, scored once and cached."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..scoring import LogProbScorer, cached_scores, identify_model, load_reference_model, require_same_vocabulary
from .config import SFTGOConfig


def reference_log_probs(dataset: Dataset, args: SFTGOConfig, tokenizer: PreTrainedTokenizerBase, dataset_name: str):
    """
    Score a prepared data set under the reference model, or find the scores on disk.

    Args:
        dataset ([`~datasets.Dataset`]):
            Examples with `example_key`, `input_ids` and `labels`.
        args ([`SFTGOConfig`]):
            Names the reference model and the cache.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The trained model's tokenizer.
        dataset_name (`str`):
            Name of the data set, for the progress bar.

    Returns:
        `pa.Table`: `example_key` and `token_log_probs`, among others.

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
    return cached_scores(dataset, load_scorer, args.score_cache_dir, settings, args.score_batch_tokens, description)
