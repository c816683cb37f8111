"""Rows of tokens that come from a generator, in whatever shape it makes them."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, IterableDataset

from hf_sft_variants.base.token_checks import check_token_rows
from hf_sft_variants.errors import InputError


def stream_of(**columns):
    return IterableDataset.from_generator(lambda: iter([columns]))


@pytest.mark.parametrize(
    "columns",
    [
        {"input_ids": np.array([5, 6, 7])},
        {"input_ids": list(torch.tensor([5, 6, 7]))},
        {"input_ids": [5, 6, 7], "completion_mask": [True, 0, 1]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "seq_lengths": [2, 1]},
        {"input_ids": []},
    ],
)
def test_accepted_rows_of_a_stream(columns):
    (row,) = check_token_rows(stream_of(**columns), list(columns), 8, "train")
    assert [int(token) for token in row["input_ids"]] == [int(token) for token in columns["input_ids"]]


@pytest.mark.parametrize("values", [[5, "a"], [5, 2**70], [5, None], [[5], [6, 7]], 5, None, [5, 8]])
def test_refused_rows_of_a_stream(values):
    with pytest.raises(InputError, match="Row 0 of the train dataset: `input_ids` has "):
        list(check_token_rows(stream_of(input_ids=values), ["input_ids"], 8, "train"))


@pytest.mark.parametrize("item_type", [pa.uint8(), pa.int16(), pa.uint64()])
@pytest.mark.parametrize("list_type", [pa.list_, pa.large_list, lambda items: pa.list_(items, 3)])
def test_rows_are_numbered_in_the_data_set(item_type, list_type):
    values = pa.array([[5, 6, 7]] * 2500 + [[5, 9, 7]], list_type(item_type))
    dataset = Dataset(pa.table({"input_ids": values}))
    with pytest.raises(InputError, match=r"Row 2500 .* has 9, which is not an id of the tokenizer \(0 to 7\)"):
        check_token_rows(dataset, ["input_ids"], 8, "train")
    with pytest.raises(InputError, match="Row 1 "):
        check_token_rows(dataset.select([7, 2500, 3]), ["input_ids"], 8, "train")
    assert check_token_rows(dataset.select([3, 2]), ["input_ids"], 8, "train").num_rows == 2
