import hashlib
import zlib
from itertools import accumulate, pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import TfidfTransformer
from transformers import PreTrainedTokenizerBase

from ..base.fingerprints import vocabulary_hash
from ..base.processes import on_main_process
from ..base.trl_internals import get_dataset_column_names
from ..errors import InputError
from .grouping import supervised_positions


logger = get_logger(__name__)

# Rows at the start of a stream that document frequencies are fitted on
STREAM_ROWS = 10_000


class TokenTfidf:
    """
    TF-IDF weight of tokens, by scikit-learn: a document is a sample's supervised tokens, a term is a token id.

    Terms are token ids, so nothing has to be aligned and any language works.

    Args:
        transformer ([`~sklearn.feature_extraction.text.TfidfTransformer`]):
            Fitted transformer; its `idf_` has one value for each token id.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that made the token ids.
        num_documents (`int`, *optional*):
            Number of the samples that it was fitted on, where it was fitted just now.
    """

    def __init__(
        self, transformer: TfidfTransformer, tokenizer: PreTrainedTokenizerBase, num_documents: int | None = None
    ):
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.num_documents = num_documents

    @classmethod
    def fit(cls, dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase) -> "TokenTfidf":
        """
        Count in how many samples of a tokenized data set each token id is supervised.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                Data set with a `labels` column, and with `seq_lengths` if it is packed. A sample that packing has cut
                counts as often as it has parts. All of it is read, so a stream has to end.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer that made the labels.
        """
        document_frequency, num_documents = np.zeros(len(tokenizer)), 0
        columns = {"labels", "seq_lengths"} & set(get_dataset_column_names(dataset))
        for batch in dataset.select_columns(sorted(columns)).iter(batch_size=1000):
            documents = _documents(**batch)
            counts, _ = _count_terms(documents, len(tokenizer))
            document_frequency += np.bincount(counts.indices, minlength=len(tokenizer))
            num_documents += len(documents)
        transformer = TfidfTransformer()
        # What `TfidfTransformer.fit` computes, without all counts in memory at once
        transformer.idf_ = np.log((1 + num_documents) / (1 + document_frequency)) + 1
        return cls(transformer, tokenizer, num_documents)

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

    @classmethod
    def load_if_there(cls, path: str | None, tokenizer: PreTrainedTokenizerBase) -> "TokenTfidf | None":
        """As [`load`]; `None` without a file."""
        return cls.load(path, tokenizer) if path is not None and Path(path).exists() else None

    def save(self, path: str | Path) -> None:
        """Write the inverse document frequencies and the vocabulary's hash as a NumPy archive (no pickle)."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")  # a killed run leaves no half-written file
        with open(partial, "wb") as file:
            np.savez_compressed(file, idf=self.transformer.idf_, vocabulary=vocabulary_hash(self.tokenizer))
        partial.replace(path)

    def digest(self) -> str:
        """Hash of the document frequencies."""
        return hashlib.sha256(np.asarray(self.transformer.idf_, dtype="<f8").tobytes()).hexdigest()[:16]


def shared_tfidf(
    dataset: Dataset | IterableDataset, path: str | None, tokenizer: PreTrainedTokenizerBase
) -> TokenTfidf:
    """
    [`load_or_fit_tfidf`] by one process, with the same result for all of them: to be called by all at once.

    Raises:
        `InputError`: In all processes, what it raises in that one.
    """
    transformer = on_main_process(lambda: load_or_fit_tfidf(dataset, path, tokenizer).transformer)
    return TokenTfidf(transformer, tokenizer)


def load_or_fit_tfidf(
    dataset: Dataset | IterableDataset, path: str | None, tokenizer: PreTrainedTokenizerBase
) -> TokenTfidf:
    """
    Read the document frequencies where `path` is a file; else fit them, and write them where `path` is given.

    Of a stream the first [`STREAM_ROWS`] rows are fitted on, so they have to be the same when it is read again.

    Raises:
        `InputError`: If the file can't be used ([`TokenTfidf.load`]), or the data set has other tokens.
    """
    if path is not None and Path(path).exists():
        if not isinstance(dataset, IterableDataset):
            logger.warning(
                f"Document frequencies are read from `tfidf_file={path!r}`, not fitted on this training set. Remove "
                "`tfidf_file` or delete the file to have them fitted."
            )
        return TokenTfidf.load(path, tokenizer)
    is_stream = isinstance(dataset, IterableDataset)
    tfidf = TokenTfidf.fit(dataset.take(STREAM_ROWS) if is_stream else dataset, tokenizer)
    if is_stream:
        logger.warning(
            f"Document frequencies are fitted on the first {tfidf.num_documents:,} examples of the stream. To have "
            "all of them counted, fit on a data set that does not stream, with `tfidf_file` set to a path, and stream "
            "with the same path."
        )
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


def _documents(labels: list[list[int]], seq_lengths: list[list[int]] | None = None) -> list[list[int]]:
    """The labels of each sample, of which a packed row has several."""
    if seq_lengths is None:
        return labels
    ends = [list(accumulate(lengths, initial=0)) for lengths in seq_lengths]
    return [row[start:end] for row, row_ends in zip(labels, ends, strict=True) for start, end in pairwise(row_ends)]


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
