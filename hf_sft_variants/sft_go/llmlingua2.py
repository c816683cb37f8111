"""Importance of tokens for `group_by="llmlingua2"`: how likely a prompt compressor is to keep their word."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
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
    Score a prepared data set with the importance model, or find the scores on disk.

    To be called by all processes at once. The model is loaded only if there are no scores, and gone afterwards.

    Args:
        dataset ([`~datasets.Dataset`]):
            Examples with `input_ids` and `labels`.
        args ([`SFTGOConfig`]):
            Names the importance model and the cache.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The trained model's tokenizer.
        dataset_name (`str`):
            Name of the data set, for the progress bar.

    Returns:
        `pa.ChunkedArray`: For each example a list of float, one for each token of `input_ids`; null without labels.

    Raises:
        `InputError`: If the importance model can't be loaded, is no token classifier with two labels, or its tokenizer
            gives no offsets.
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


@dataclass
class _SupervisedText:
    """What an example's supervised tokens say: the tokens' positions in `input_ids` and their characters in `text`."""

    text: str
    positions: list[int]
    spans: list[Span]


class LLMLingua2Scorer:
    """
    Scores tokens by the probability with which [LLMLingua-2](https://huggingface.co/papers/2403.12968) keeps the word
    they stand in.

    An example's text is what its supervised tokens decode to, special tokens left out. It is read in windows that end
    at word boundaries; a word's probability is the mean over its sub-words, a token's the highest of the words it
    shares a character with. Tokens of white space, special tokens and tokens that are not supervised have 0.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Token classifier with two labels, 1 for "keep".
        importance_tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The classifier's tokenizer, a fast one.
        target_tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that made the examples, of any kind.
        batch_tokens (`int`, *optional*, defaults to `4096`):
            Most sub-words of a batch of windows, padding included.
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
        Score examples.

        Args:
            examples (`list[dict]`):
                Examples with `input_ids` and `labels` (`-100` on tokens that are not supervised).

        Returns:
            `list[dict]`: For each example `importance_scores`, a float32 array: a number in [0, 1] for each token of
            `input_ids`.
        """
        supervised = [self._supervised_text(example) for example in examples]
        splits = [split_into_words(part.text, self.importance_tokenizer) for part in supervised]
        windows = [
            (number, start, end)
            for number, split in enumerate(splits)
            for start, end in cut_windows(split.word_starts, len(split.sub_word_ids), self._window)
        ]
        windowed = [splits[number].sub_word_ids[start:end] for number, start, end in windows]
        keep = [np.zeros(len(split.sub_word_ids)) for split in splits]
        for (number, start, end), probabilities in zip(windows, self._keep_probabilities(windowed), strict=True):
            keep[number][start:end] = probabilities
        results = []
        for example, part, split, sub_word_scores in zip(examples, supervised, splits, keep, strict=True):
            characters = score_characters(split, sub_word_scores)
            scores = np.zeros(len(example["input_ids"]), dtype=np.float32)
            scores[part.positions] = [characters[start:end].max(initial=0) for start, end in part.spans]
            results.append({"importance_scores": scores})
        return results

    def _supervised_text(self, example: dict) -> _SupervisedText:
        labels = np.asarray(example["labels"])
        positions = supervised_positions(labels)
        positions = positions[~np.isin(labels[positions], self._special_token_ids)]
        result = _SupervisedText("", positions.tolist(), [])
        # Each run of tokens is decoded by itself, and no word goes on from one into the next
        for run in np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1):
            text, spans = self._token_offsets(labels[run])
            start = len(result.text)
            result.spans += [(start + first, start + last) for first, last in spans]
            result.text += text + "\n"
        return result

    @torch.no_grad()
    def _keep_probabilities(self, windows: list[list[int]]) -> list[np.ndarray]:
        """Probability of each sub-word to be kept; windows of similar length are read together."""
        extra = len(self._prefix) + len(self._suffix)
        shards = plan_shards([len(window) + extra for window in windows], self.batch_tokens)
        results = [None] * len(windows)
        for batch in (batch for shard in shards for batch in shard):
            rows = [torch.tensor(self._prefix + windows[number] + self._suffix) for number in batch]
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            padding = self.importance_tokenizer.pad_token_id or 0  # masked, so any token would do
            input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
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
