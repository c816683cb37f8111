import hashlib
import json
import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import TfidfTransformer
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .grouping import supervised_positions


logger = get_logger(__name__)


class TokenTfidf:
    """
    TF-IDF weight of tokens, by scikit-learn: a document is a sample's supervised tokens, a term is a token id.

    Terms are token ids, so nothing has to be aligned and any language works.

    Args:
        transformer ([`~sklearn.feature_extraction.text.TfidfTransformer`]):
            Fitted transformer; its `idf_` has one value for each token id.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that made the token ids.
    """

    def __init__(self, transformer: TfidfTransformer, tokenizer: PreTrainedTokenizerBase):
        self.transformer = transformer
        self.tokenizer = tokenizer

    @classmethod
    def fit(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> "TokenTfidf":
        """
        Count in how many samples of a tokenized data set each token id is supervised.

        Args:
            dataset ([`~datasets.Dataset`]):
                Data set with a `labels` column.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer that made the labels.
        """
        document_frequency = np.zeros(len(tokenizer))
        for batch in dataset.select_columns(["labels"]).iter(batch_size=1000):
            counts, _ = _count_terms(batch["labels"], len(tokenizer))
            document_frequency += np.bincount(counts.indices, minlength=len(tokenizer))
        transformer = TfidfTransformer()
        # What `TfidfTransformer.fit` computes, without all counts in memory at once
        transformer.idf_ = np.log((1 + len(dataset)) / (1 + document_frequency)) + 1
        return cls(transformer, tokenizer)

    @classmethod
    def load(cls, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> "TokenTfidf":
        """
        Read what [`save`] wrote.

        Raises:
            `InputError`: If the file is no such file, or was written with another tokenizer.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                idf, vocabulary = arrays["idf"], str(arrays["vocabulary"])
            if idf.dtype.kind != "f" or idf.ndim != 1 or not (np.isfinite(idf) & (idf > 0)).all():
                raise InputError("`idf` is no list of positive numbers")
        except (OSError, ValueError, KeyError, EOFError, MemoryError, BadZipFile, zlib.error) as error:
            raise InputError(
                f"`tfidf_file={str(path)!r}` can't be read ({error}). Delete it to have it fitted again."
            ) from error
        if vocabulary != vocabulary_hash(tokenizer) or len(idf) != len(tokenizer):
            raise InputError(
                f"`tfidf_file={str(path)!r}` was written with another tokenizer. Give another path, or delete the "
                "file to have it fitted again."
            )
        transformer = TfidfTransformer()
        transformer.idf_ = idf.astype(np.float64)
        return cls(transformer, tokenizer)

    def save(self, path: str | Path) -> None:
        """Write the inverse document frequencies and the vocabulary's hash as a NumPy archive (no pickle)."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")  # a killed run leaves no half-written file
        with open(partial, "wb") as file:
            np.savez_compressed(file, idf=self.transformer.idf_, vocabulary=vocabulary_hash(self.tokenizer))
        partial.replace(path)


def load_or_fit_tfidf(
    dataset: Dataset | IterableDataset, path: str | None, tokenizer: PreTrainedTokenizerBase
) -> TokenTfidf:
    """
    Read the document frequencies where `path` is a file; else fit them, and write them where `path` is given.

    Raises:
        `InputError`: If there is nothing to read and the data set is a stream, which can't be read beforehand.
    """
    if path is not None and Path(path).exists():
        if not isinstance(dataset, IterableDataset):
            logger.warning(
                f"Document frequencies are read from `tfidf_file={path!r}`, not fitted on this training set. Remove "
                "`tfidf_file`, which only streaming needs, or delete the file to have them fitted."
            )
        return TokenTfidf.load(path, tokenizer)
    if isinstance(dataset, IterableDataset):
        raise InputError(
            f"`group_by='tfidf'` on a streaming training set needs fitted document frequencies, and `tfidf_file` is "
            f"{path!r}. Run once on a sample that does not stream with `tfidf_file` set to a path, then stream with "
            "the same path; or use `group_by='column'`."
        )
    tfidf = TokenTfidf.fit(dataset, tokenizer)
    if path is not None:
        tfidf.save(path)
    return tfidf


def add_tfidf_scores(examples: dict[str, list], idf: np.ndarray) -> dict[str, list[np.ndarray]]:
    """
    For `Dataset.map`, batched: adds `importance_scores`, the TF-IDF weight of each supervised token, else 0.

    Args:
        examples (`dict[str, list]`):
            Batch with `labels`.
        idf (`np.ndarray` of shape `(vocab_size,)`):
            Inverse document frequency of each token id.
    """
    transformer = TfidfTransformer()
    transformer.idf_ = idf
    counts, term_of_token = _count_terms(examples["labels"], len(idf))
    # One weight for each distinct term of a row, in the order of `counts`
    weights = transformer.transform(counts).data.astype(np.float32)[term_of_token]
    rows, start = [], 0
    for labels in examples["labels"]:
        positions = supervised_positions(np.asarray(labels))
        scores = np.zeros(len(labels), dtype=np.float32)
        scores[positions] = weights[start : start + len(positions)]
        rows.append(scores)
        start += len(positions)
    return {"importance_scores": rows}


def _count_terms(label_rows: list[list[int]], vocab_size: int) -> tuple[csr_array, np.ndarray]:
    """
    Count the supervised token ids of each row.

    Returns:
        `tuple[csr_array, np.ndarray]`: Counts of shape `(rows, vocab_size)`, and for each supervised token, row after
        row, where its term stands in the counts' data.
    """
    rows = [np.asarray(labels) for labels in label_rows]
    rows = [labels[supervised_positions(labels)] for labels in rows]
    token_ids = np.concatenate(rows).astype(np.int64)
    if token_ids.size and token_ids.max() >= vocab_size:
        raise InputError(
            f"The data set has the token id {token_ids.max()}, but the tokenizer has {vocab_size} tokens. Pass the "
            "tokenizer that made `input_ids` as `processing_class`."
        )
    row_of_token = np.repeat(np.arange(len(rows)), [len(ids) for ids in rows])
    pairs, term_of_token, counts = np.unique(
        row_of_token * vocab_size + token_ids, return_inverse=True, return_counts=True
    )
    row_ends = np.searchsorted(pairs, np.arange(len(rows) + 1) * vocab_size)
    matrix = csr_array((counts.astype(np.float64), pairs % vocab_size, row_ends), shape=(len(rows), vocab_size))
    return matrix, term_of_token


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells tokenizers apart: all tokens and their ids."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
