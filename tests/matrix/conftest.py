import copy

import pytest
import torch
from datasets import Dataset, IterableDataset
from fixtures.small_models import make_model
from helpers import SMALL
from methods import METHODS, with_references
from trl import SFTTrainer


def pre_tokenized(prompt_lengths, response_lengths) -> Dataset:
    """Rows with a masked prompt, a key of one to four tokens at the end, and scores of two reference models."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number, (prompt, response) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        input_ids = torch.randint(3, 300, (prompt + response,), generator=generator).tolist()
        num_key = number % 4 + 1
        rows.append(
            {
                "input_ids": input_ids,
                "labels": [-100] * prompt + input_ids[prompt:],
                "key_mask": [0] * (prompt + response - num_key) + [1] * num_key,
            }
        )
    return with_references(Dataset.from_list(rows))


@pytest.fixture(scope="session")
def rows() -> Dataset:
    """Eight pre-tokenized rows of different lengths, in all methods' columns."""
    return pre_tokenized((3, 9, 1, 12, 6, 2, 15, 4), (14, 6, 19, 9, 5, 12, 8, 23))


@pytest.fixture(scope="session")
def even_rows() -> Dataset:
    """The same with twelve labels per row, so that the mean over examples equals SFTTrainer's mean over tokens."""
    return pre_tokenized((3, 9, 1, 12, 6, 2, 15, 4), [12] * 8)


@pytest.fixture(scope="session")
def equal_rows() -> Dataset:
    """Sixteen rows of tokens of different lengths with nine labels in each."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in (30, 12, 17, 11, 25, 18, 21, 14, 29, 15, 13, 19, 24, 23, 16, 27):
        input_ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        rows.append({"input_ids": input_ids, "labels": [-100] * (length - 9) + input_ids[-9:]})
    return Dataset.from_list(rows)


@pytest.fixture(scope="session")
def scored_chat_rows(chat_rows) -> Dataset:
    return with_references(chat_rows)


@pytest.fixture
def llama(tokenizer):
    return make_model("Llama", tokenizer)


def it_trains(*args, **kwargs):
    raise AssertionError("It trains.")


class Start:
    """Starts trainers on a replaceable model and on rows by name; reaching a training step is an error."""

    def __init__(self, model, tokenizer, token_rows, chat_rows):
        self.model, self.tokenizer = model, copy.deepcopy(tokenizer)
        self.rows = {"tokens": token_rows, "chat": chat_rows, "raw chat": chat_rows}
        self.rows["stream"] = token_rows.to_iterable_dataset()
        self.rows["stream of large ids"] = IterableDataset.from_generator(lambda: iter([{"input_ids": [5, 2**70]}]))

    def make(self, method, options, rows="tokens", **arguments):
        if isinstance(rows, list | dict):
            dataset = Dataset.from_list(rows) if isinstance(rows, list) else Dataset.from_dict(rows)
        else:
            dataset = self.rows[rows]
        has_scores = "ref_logps" in (dataset.column_names or ())
        needs_scores = method == "poft" and not {"reference_models", "reference_score_file"} & options.keys()
        if needs_scores and not has_scores and rows != "raw chat":
            dataset = with_references(dataset)
        used = METHODS[method]
        args = used.config_class("run", **SMALL, **options)
        arguments = {"args": args, "train_dataset": dataset, "processing_class": self.tokenizer, **arguments}
        return used.trainer_class(self.model, **arguments)

    def __call__(self, *args, **kwargs):
        self.make(*args, **kwargs).train()


@pytest.fixture
def start(tiny_model, tokenizer, token_rows, chat_rows, tmp_path, monkeypatch):
    """In an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SFTTrainer, "training_step", it_trains)
    return Start(tiny_model, tokenizer, token_rows, chat_rows)
