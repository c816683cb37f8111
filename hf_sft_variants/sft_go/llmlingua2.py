"""Importance of tokens for `group_by="llmlingua2"`: the probability that a prompt compressor keeps their word."""

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.fingerprints import vocabulary_hash
from ..scoring import cached_scores
from ..scoring.shards import plan_shards
from ..text.special_tokens import special_token_ids
from ..text.token_offsets import Span, TokenOffsets
from .config import SFTGOConfig
from .grouping import supervised_positions
from .importance_model import MAX_WINDOW, identify_importance_model, load_importance_model, max_window
from .importance_words import cut_windows, score_characters, split_into_words


# Label of the sub-words that the compressor keeps
_KEEP = 1

# To be raised when the same model would give other scores
_SCHEMA_VERSION = 1


def importance_scores(
    dataset: Dataset, args: SFTGOConfig, tokenizer: PreTrainedTokenizerBase, dataset_name: str
) -> pa.ChunkedArray:
    """
    Score a prepared data set with the importance model, or read the scores from the cache: for each example a list of
    floats, one for each token of `input_ids`; null without labels. Must be called by all processes. `tokenizer` is the
    trained model's.
    """
    settings = {
        "kind": "llmlingua2",
        "schema": _SCHEMA_VERSION,
        **identify_importance_model(args.importance_model),
        "window": MAX_WINDOW,
        "target_vocabulary": vocabulary_hash(tokenizer),
    }

    def load_scorer():
        model, importance_tokenizer = load_importance_model(args.importance_model)
        return LLMLingua2Scorer(model, importance_tokenizer, tokenizer, args.score_batch_tokens)

    description = f"Scoring {dataset_name} dataset with {args.importance_model}"
    scores = cached_scores(dataset, load_scorer, args.score_cache_dir, settings, args.score_batch_tokens, description)
    return scores["importance_scores"]


class LLMLingua2Scorer:
    """
    Scores tokens by the probability that [LLMLingua-2](https://huggingface.co/papers/2403.12968) keeps their word.

    The text of an example is what its supervised tokens decode to, without special tokens. It is read in windows that
    end at word boundaries. The probability of a word is the mean over its sub-words, that of a token the highest of
    the words it shares a character with. Tokens of white space, special tokens and tokens that are not supervised get
    0.

    `importance_tokenizer`, the model's, must be fast; `target_tokenizer`, which made the examples, may be of any kind.
    A batch of windows has at most `batch_tokens` sub-words, padding included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        importance_tokenizer: PreTrainedTokenizerBase,
        target_tokenizer: PreTrainedTokenizerBase,
        batch_tokens: int = 4096,
    ):
        self.model = model.eval()
        self.importance_tokenizer = importance_tokenizer
        self.batch_tokens = batch_tokens
        self._token_offsets = TokenOffsets(target_tokenizer)
        self._special_token_ids = list(special_token_ids(target_tokenizer))
        self._prefix, self._suffix = _surrounding_special_tokens(importance_tokenizer)
        self._window = max_window(model) - len(self._prefix) - len(self._suffix)

    def __call__(self, examples: list[dict]) -> list[dict]:
        """
        Score examples with `input_ids` and `labels`; each gets `importance_scores`, a float32 array with a number in
        [0, 1] for each token.
        """
        supervised = [self._supervised_text(example) for example in examples]
        splits = [split_into_words(text, self.importance_tokenizer) for text, _, _ in supervised]
        windows = [
            split.sub_word_ids[start:end]
            for split in splits
            for start, end in cut_windows(split.word_starts, len(split.sub_word_ids), self._window)
        ]
        # The windows follow each other: their probabilities are those of all sub-words of all texts
        keep = np.concatenate([np.zeros(0), *self._keep_probabilities(windows)])
        ends = np.cumsum([len(split.sub_word_ids) for split in splits])
        results = []
        for example, (_, positions, spans), split, sub_word_scores in zip(
            examples, supervised, splits, np.split(keep, ends[:-1]), strict=True
        ):
            characters = score_characters(split, sub_word_scores)
            scores = np.zeros(len(example["input_ids"]), dtype=np.float32)
            scores[positions] = [characters[start:end].max(initial=0) for start, end in spans]
            results.append({"importance_scores": scores})
        return results

    def _supervised_text(self, example: dict) -> tuple[str, np.ndarray, list[Span]]:
        """Text of the supervised tokens, their positions in `input_ids`, and their characters in the text."""
        labels = np.asarray(example["labels"])
        positions = supervised_positions(labels)
        positions = positions[~np.isin(labels[positions], self._special_token_ids)]
        text, spans = "", []
        # Each run of tokens is decoded separately, and no word continues from one run to the next
        for run in np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1):
            run_text, run_spans = self._token_offsets(labels[run])
            spans += [(len(text) + start, len(text) + end) for start, end in run_spans]
            text += run_text + "\n"
        return text, positions, spans

    @torch.no_grad()
    def _keep_probabilities(self, windows: list[list[int]]) -> list[np.ndarray]:
        """Probability of each sub-word to be kept; windows of similar length share a batch."""
        rows = [torch.tensor(self._prefix + window + self._suffix) for window in windows]
        results = [None] * len(windows)
        shards = plan_shards([len(row) for row in rows], self.batch_tokens)
        for batch in (batch for shard in shards for batch in shard):
            mask = pad_sequence([torch.ones_like(rows[number]) for number in batch], batch_first=True)
            padding = self.importance_tokenizer.pad_token_id or 0  # masked, so any token would do
            input_ids = pad_sequence([rows[number] for number in batch], batch_first=True, padding_value=padding)
            device = self.model.device
            logits = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
            keep = logits.float().softmax(dim=-1)[..., _KEEP].cpu().numpy()
            for number, row in zip(batch, keep, strict=True):
                results[number] = row[len(self._prefix) :][: len(windows[number])]
        return results


def _surrounding_special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Special tokens that a tokenizer puts before and after a text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    token_ids, is_special = encoding["input_ids"], encoding["special_tokens_mask"]
    first, end = is_special.index(0), len(is_special) - is_special[::-1].index(0)
    return token_ids[:first], token_ids[end:]
