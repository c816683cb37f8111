import math
from collections import Counter

import numpy as np
import pytest
import trl
from accelerate import PartialState
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer

from hf_sft_variants.errors import InputError
from hf_sft_variants.sft_go.tfidf import TokenTfidf, add_tfidf_scores, shared_tfidf


@pytest.fixture(autouse=True)
def process_state():
    PartialState(cpu=True)  # a trainer's arguments do this; accelerate's loggers need it


def slow_tfidf(documents, training_documents):
    """TF-IDF by scikit-learn's documented formula, document by document."""
    frequency = Counter(term for document in training_documents for term in set(document))
    num_documents = len(training_documents)
    rows = []
    for document in documents:
        counts = Counter(document)
        weight = {
            term: count * (math.log((1 + num_documents) / (1 + frequency[term])) + 1) for term, count in counts.items()
        }
        norm = math.sqrt(sum(value * value for value in weight.values()))
        rows.append([weight[term] / norm for term in document])
    return rows


def test_scores_equal_the_slow_formula(token_rows, tokenizer):
    tfidf = TokenTfidf.fit(token_rows, tokenizer)
    scores = add_tfidf_scores({"labels": list(token_rows["labels"])}, tfidf.idf)["importance_scores"]
    documents = [[label for label in labels[1:] if label != -100] for labels in token_rows["labels"]]
    for labels, row, expected in zip(token_rows["labels"], scores, slow_tfidf(documents, documents), strict=True):
        positions = [t for t in range(1, len(labels)) if labels[t] != -100]
        np.testing.assert_allclose(row[positions], expected, rtol=1e-6)
        assert all(row[t] == 0 for t in range(len(labels)) if t not in positions)


def test_two_hundred_random_texts(random_texts, tokenizer):
    rows = Dataset.from_dict({"labels": tokenizer(random_texts)["input_ids"]})
    scores = add_tfidf_scores({"labels": list(rows["labels"])}, TokenTfidf.fit(rows, tokenizer).idf)
    documents = [labels[1:] for labels in rows["labels"]]
    for row, expected in zip(scores["importance_scores"], slow_tfidf(documents, documents), strict=True):
        np.testing.assert_allclose(row[1:], expected, rtol=1e-5)


def test_frequencies_are_scikit_learns(token_rows, tokenizer):
    documents = [[label for label in labels[1:] if label != -100] for labels in token_rows["labels"]]
    vectorizer = TfidfVectorizer(analyzer=lambda document: document).fit(documents)
    idf = TokenTfidf.fit(token_rows, tokenizer).idf
    for term, column in vectorizer.vocabulary_.items():
        assert idf[term] == pytest.approx(vectorizer.idf_[column], rel=1e-12)


def test_unseen_terms_and_rows_without_labels(tokenizer):
    tfidf = TokenTfidf.fit(Dataset.from_dict({"labels": [[-100, 5, 5, 6], [-100, 6, 7]]}), tokenizer)
    scores = add_tfidf_scores({"labels": [[-100, 9, 6], [-100, -100], [4]]}, tfidf.idf)
    assert [list(row) for row in scores["importance_scores"]][1:] == [[0, 0], [0]]
    expected = slow_tfidf([[9, 6]], [[5, 5, 6], [6, 7]])[0]
    np.testing.assert_allclose(scores["importance_scores"][0][1:], expected, rtol=1e-6)


def test_file_is_written_once_and_read_after(token_rows, tokenizer, tmp_path):
    path = tmp_path / "new_folder" / "idf.npz"
    fitted = shared_tfidf(token_rows, str(path), tokenizer)
    read = shared_tfidf(token_rows.select(range(2)), str(path), tokenizer)
    np.testing.assert_array_equal(fitted.idf, read.idf)
    assert [file.name for file in path.parent.iterdir()] == ["idf.npz"]


def test_file_of_another_tokenizer(token_rows, tokenizer, tmp_path, monkeypatch):
    TokenTfidf.fit(token_rows, tokenizer).save(tmp_path / "idf.npz")
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: {"other": 0})
    with pytest.raises(ValueError, match="written with another tokenizer"):
        TokenTfidf.load(tmp_path / "idf.npz", tokenizer)


def pickled(path):
    with open(path, "wb") as file:
        np.savez(file, idf=np.array([{"any": "object"}], dtype=object), vocabulary="")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no archive"),
        lambda path: path.write_bytes(b"PK\x03\x04 cut"),
        pickled,
    ],
)
def test_file_that_is_not_opened(tokenizer, tmp_path, write):
    write(tmp_path / "idf.npz")
    with pytest.raises(ValueError, match=r"tfidf_file=.*can't be read"):
        TokenTfidf.load(tmp_path / "idf.npz", tokenizer)


def test_a_stream_is_fitted_on_its_beginning(token_rows, tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("hf_sft_variants.sft_go.tfidf.STREAM_ROWS", 5)
    expected = TokenTfidf.fit(token_rows.select(range(5)), tokenizer)
    path = tmp_path / "idf.npz"
    fitted = shared_tfidf(token_rows.to_iterable_dataset(), str(path), tokenizer)
    assert fitted.digest() == expected.digest() != TokenTfidf.fit(token_rows, tokenizer).digest()
    assert "Document frequencies are fitted on the first 5 examples of the stream" in caplog.text
    assert shared_tfidf(token_rows.to_iterable_dataset(), str(path), tokenizer).digest() == expected.digest()


def test_all_processes_have_what_the_first_one_has(token_rows, tokenizer, monkeypatch):
    """Also where each reads another part of a stream; and its error."""
    sent = []

    def send(outcome):
        sent.append(list(outcome))
        return outcome

    monkeypatch.setattr("hf_sft_variants.base.processes.broadcast_object_list", send)
    first = shared_tfidf(token_rows.select(range(4)), None, tokenizer)
    with pytest.raises(InputError, match="has the token id 5000"):
        shared_tfidf(Dataset.from_dict({"labels": [[3, 5000]]}), None, tokenizer)

    monkeypatch.setattr("hf_sft_variants.base.processes.broadcast_object_list", lambda outcome: sent.pop(0))
    monkeypatch.setattr(PartialState, "is_main_process", False)
    other_rows = token_rows.select(range(4, 8)).to_iterable_dataset()
    assert shared_tfidf(other_rows, None, tokenizer).digest() == first.digest()
    with pytest.raises(InputError, match="has the token id 5000"):
        shared_tfidf(other_rows, None, tokenizer)


def test_documents_of_packed_rows(token_rows, tokenizer):
    packed = trl.pack_dataset(token_rows.select_columns(["input_ids", "labels"]), seq_length=100)
    assert len(packed) < len(token_rows)
    expected = TokenTfidf.fit(token_rows, tokenizer).digest()
    assert TokenTfidf.fit(packed, tokenizer).digest() == expected
    assert TokenTfidf.fit(packed.to_iterable_dataset(), tokenizer).digest() == expected


def test_token_ids_beyond_the_tokenizer(tokenizer):
    with pytest.raises(ValueError, match=rf"token id 5000, but the tokenizer has {len(tokenizer)} tokens"):
        TokenTfidf.fit(Dataset.from_dict({"labels": [[3, 5000]]}), tokenizer)
