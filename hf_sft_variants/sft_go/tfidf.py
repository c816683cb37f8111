"""Importance of tokens for `group_by="tfidf"`: frequent in their sample, rare in the others."""

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..base.fingerprints import vocabulary_hash
from ..base.processes import on_main_process
from ..base.trl_internals import get_dataset_column_names
from ..errors import InputError
from ..files import atomic_write
from .grouping import supervised_positions


logger = get_logger(__name__)

# Rows at the start of a stream that document frequencies are fitted on
STREAM_ROWS = 10_000


@dataclass
class TokenTfidf:
    """
    Inverse document frequencies of token ids, where a document is a sample's supervised tokens. `idf` has the shape
    `(vocab_size,)` and follows scikit-learn's formula; `vocabulary` is a hash of the tokenizer's.
    """

    idf: np.ndarray
    vocabulary: str

    @classmethod
    def fit(cls, dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase) -> "TokenTfidf":
        """
        Count the samples in which each token id is supervised, from the columns `labels` and, of packed rows,
        `seq_lengths`. A sample that packing has cut counts as often as it has parts.
        """
        document_frequency, num_documents = np.zeros(len(tokenizer)), 0
        columns = {"labels", "seq_lengths"} & set(get_dataset_column_names(dataset))
        for batch in dataset.select_columns(sorted(columns)).iter(batch_size=1000):
            lengths = batch.get("seq_lengths", [[]] * len(batch["labels"]))
            for labels, ends in zip(batch["labels"], map(np.cumsum, lengths), strict=True):
                for sample in np.split(np.asarray(labels), ends[:-1]):
                    _, token_ids = _document(sample, len(tokenizer))
                    document_frequency[np.unique(token_ids)] += 1
                    num_documents += 1
        return cls(np.log((1 + num_documents) / (1 + document_frequency)) + 1, vocabulary_hash(tokenizer))

    @classmethod
    def load(cls, path: str | Path | None, tokenizer: PreTrainedTokenizerBase) -> "TokenTfidf | None":
        """
        Read a file that [`save`] wrote; `None` if there is none. Raises an `InputError` if the file can't be read or
        was written with another tokenizer.
        """
        if path is None or not Path(path).exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                idf, vocabulary = arrays["idf"], str(arrays["vocabulary"])
            if idf.dtype.kind != "f" or idf.ndim != 1 or not (np.isfinite(idf) & (idf > 0)).all():
                raise InputError("`idf` must be a list of positive numbers")
        except (OSError, ValueError, KeyError, EOFError, MemoryError, BadZipFile, zlib.error) as error:
            raise InputError(
                f"`tfidf_file={str(path)!r}` can't be read ({error}). Delete it to have it fitted again."
            ) from error
        if vocabulary != vocabulary_hash(tokenizer) or len(idf) != len(tokenizer):
            raise InputError(
                f"`tfidf_file={str(path)!r}` was written with another tokenizer. Give another path, or delete the "
                "file to have it fitted again."
            )
        return cls(idf.astype(np.float64), vocabulary)

    def save(self, path: str | Path) -> None:
        """Write a NumPy archive without pickled objects."""
        with atomic_write(path) as partial, open(partial, "wb") as file:
            np.savez_compressed(file, idf=self.idf, vocabulary=self.vocabulary)

    def digest(self) -> str:
        """Hash of the document frequencies."""
        return hashlib.sha256(np.asarray(self.idf, dtype="<f8").tobytes()).hexdigest()[:16]


def shared_tfidf(
    dataset: Dataset | IterableDataset, path: str | None, tokenizer: PreTrainedTokenizerBase
) -> TokenTfidf:
    """
    Read the document frequencies if `path` is a file, otherwise fit them and write them to `path`, if one is given.
    The main process does this for all processes; must be called by all processes. Of a stream, the first `STREAM_ROWS`
    rows are fitted on, so they have to be the same when it is read again.
    """
    return on_main_process(lambda: _load_or_fit(dataset, path, tokenizer))


def _load_or_fit(dataset: Dataset | IterableDataset, path: str | None, tokenizer: PreTrainedTokenizerBase):
    is_stream = isinstance(dataset, IterableDataset)
    tfidf = TokenTfidf.load(path, tokenizer)
    if tfidf is not None:
        if not is_stream:
            logger.warning(
                f"Document frequencies are read from `tfidf_file={path!r}`, not fitted on this training set. Remove "
                "`tfidf_file` or delete the file to have them fitted."
            )
        return tfidf
    if is_stream:
        logger.warning(
            f"Document frequencies are fitted on the first {STREAM_ROWS:,} examples of the stream. To have all of "
            "them counted, fit on a data set that does not stream, with `tfidf_file` set to a path, and stream with "
            "the same path."
        )
    tfidf = TokenTfidf.fit(dataset.take(STREAM_ROWS) if is_stream else dataset, tokenizer)
    if path is not None:
        tfidf.save(path)
    return tfidf


def add_tfidf_scores(examples: dict[str, list], idf: np.ndarray) -> dict[str, list[np.ndarray]]:
    """
    For `Dataset.map`, batched: add `importance_scores`, the TF-IDF weight of each supervised token of `labels` and 0
    for other tokens. The weights of a row's distinct terms have the norm 1.
    """
    rows = []
    for labels in map(np.asarray, examples["labels"]):
        positions, token_ids = _document(labels, len(idf))
        terms, term_of_token, counts = np.unique(token_ids, return_inverse=True, return_counts=True)
        weights = counts * idf[terms]
        scores = np.zeros(len(labels), dtype=np.float32)
        scores[positions] = (weights / np.linalg.norm(weights))[term_of_token] if len(positions) else 0
        rows.append(scores)
    return {"importance_scores": rows}


def _document(labels: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and ids of the supervised tokens."""
    positions = supervised_positions(labels)
    token_ids = labels[positions]
    if len(token_ids) and token_ids.max() >= vocab_size:
        raise InputError(
            f"The data set has the token id {token_ids.max()}, but the tokenizer has {vocab_size} tokens. Pass the "
            "tokenizer that made `input_ids` as `processing_class`."
        )
    return positions, token_ids
