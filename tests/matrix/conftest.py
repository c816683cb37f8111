import pytest
import torch
from datasets import Dataset
from methods import with_references


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
    """Such rows with as many labels each, where the mean over examples is SFTTrainer's mean over tokens."""
    return pre_tokenized((3, 9, 1, 12, 6, 2, 15, 4), [12] * 8)
