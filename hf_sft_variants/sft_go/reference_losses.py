"""Log-probabilities of a data set under the reference model of `group_by="rho1"`, scored once and cached."""

from pathlib import Path

from accelerate.utils import release_memory
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..scoring import find_scores, identify_model, load_reference_model, score_log_probs, scores_path
from .config import SFTGOConfig


def score_cache_dir(args: SFTGOConfig) -> Path:
    """Folder of all cached scores."""
    return Path(args.score_cache_dir or Path(HF_HOME) / "hf_sft_variants" / "scores")


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
        `ValueError`: If the reference model has another vocabulary or can't be loaded.
    """
    require_same_vocabulary(args.reference_model, tokenizer, args.reference_model_init_kwargs)
    settings = {
        "kind": "log_probs",
        **identify_model(args.reference_model, args.reference_model_init_kwargs),
    }
    path = scores_path(score_cache_dir(args), settings, dataset)
    scores = find_scores(path, settings)
    if scores is not None:
        return scores
    model = load_reference_model(args.reference_model, args.reference_model_init_kwargs)
    description = f"Scoring {dataset_name} dataset with {args.reference_model}"
    scores = score_log_probs(dataset, model, path, settings, args.score_batch_tokens, True, description)
    del model
    release_memory()
    return scores


def require_same_vocabulary(
    reference_model: str, tokenizer: PreTrainedTokenizerBase, model_init_kwargs: dict | None = None
) -> None:
    """
    Token losses can be compared only token by token.

    Raises:
        `ValueError`: If the reference model's tokenizer has another vocabulary, or there is none.
    """
    try:
        options = {name: (model_init_kwargs or {}).get(name) for name in ("revision", "trust_remote_code")}
        options = {name: value for name, value in options.items() if value is not None}
        reference_tokenizer = AutoTokenizer.from_pretrained(reference_model, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`reference_model={reference_model!r}` has no tokenizer that can be loaded: {error} `group_by='rho1'` "
            "needs one to compare the vocabularies; save the tokenizer beside the model."
        ) from error
    ours, theirs = tokenizer.get_vocab(), reference_tokenizer.get_vocab()
    if ours != theirs:
        different = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
        raise ValueError(
            f"`reference_model={reference_model!r}` has another vocabulary than the trained model: {len(theirs)} "
            f"tokens against {len(ours)}, the first difference is {different[0]!r}. `group_by='rho1'` compares losses "
            "token by token; choose a reference model of the same family."
        )
