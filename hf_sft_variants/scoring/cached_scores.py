"""The flow that all scoring models share: look for the scores on disk, else load, score, and free the model."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from accelerate.utils import release_memory
from datasets import Dataset
from huggingface_hub.constants import HF_HOME

from .shards import find_scores, score_in_shards, scores_path


def cached_scores(
    dataset: Dataset,
    load_scorer: Callable[[], Callable[[list[dict]], list[dict]]],
    cache_dir: str | Path | None,
    settings: dict,
    batch_tokens: int,
    description: str,
) -> pa.Table:
    """
    Scores of a data set: found on disk, or computed and kept there. To be called by all processes at once.

    Args:
        dataset ([`~datasets.Dataset`]):
            Examples with `example_key`, `input_ids` and `labels`.
        load_scorer (`Callable`):
            Loads the scoring model, and returns what scores a batch, as in [`score_in_shards`]. Called only if there
            are no scores; the model is gone when this function returns.
        cache_dir (`str` or `Path`, *optional*):
            Folder of all scores, by default `hf_sft_variants/scores` in the Hugging Face home folder.
        settings (`dict`):
            All that the scores depend on beside the examples, as JSON values.
        batch_tokens (`int`):
            Most tokens of a batch, padding included.
        description (`str`):
            Text before the progress bar.

    Returns:
        `pa.Table`: `example_key` and the scorer's columns, a row for each example.

    Raises:
        `InputError`: If the scores can't be written; what was scored so far is kept.
        `InputError`: If the scores on disk can't be read.
    """
    path = scores_path(cache_dir or Path(HF_HOME) / "hf_sft_variants" / "scores", settings, dataset)
    scores = find_scores(path, settings)
    if scores is not None:
        return scores
    scorer = load_scorer()
    scores = score_in_shards(dataset, scorer, path, settings, batch_tokens, description)
    del scorer
    release_memory()
    return scores
