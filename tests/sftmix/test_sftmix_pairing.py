"""Halves, the order of pairs, partners inside a micro-batch, and λ."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from hf_sft_variants.base.trl_internals import DataCollatorForLanguageModeling
from hf_sft_variants.sftmix.mixing import Document, documents_of, draw_pairs, mixup_inputs
from hf_sft_variants.sftmix.pairing import (
    CONFIDENT,
    NEITHER,
    UNCONFIDENT,
    draw_order,
    halves_of_order,
    random_halves,
)


halves_strategy = st.lists(st.sampled_from([CONFIDENT, UNCONFIDENT, NEITHER]), min_size=1, max_size=60).map(
    lambda halves: torch.tensor(halves, dtype=torch.int8)
)
unknown = torch.full((50,), NEITHER, dtype=torch.int8)


@given(num_examples=st.integers(0, 50), seed=st.integers(-5, 5))
@settings(deadline=None)
def test_random_halves_are_equal(num_examples, seed):
    counts = Counter(random_halves(num_examples, seed).tolist())
    assert counts[CONFIDENT] == counts[UNCONFIDENT] == num_examples // 2
    assert counts[NEITHER] == num_examples % 2
    assert torch.equal(random_halves(num_examples, seed), random_halves(num_examples, seed))


def test_halves_of_an_order():
    halves = halves_of_order(np.array([4, 0, 3]), 6)
    assert halves.tolist() == [NEITHER, NEITHER, NEITHER, UNCONFIDENT, CONFIDENT, NEITHER]


class TestOrder:
    @given(halves=halves_strategy, seed=st.integers(0, 3), epoch=st.integers(0, 3))
    @settings(deadline=None)
    def test_whole_pairs_without_replacement(self, halves, seed, epoch):
        rows = draw_order(halves, seed, epoch)
        assert sorted(rows) == list(range(len(halves)))
        assert rows == draw_order(halves, seed, epoch)
        num_pairs = min((halves == half).sum() for half in (CONFIDENT, UNCONFIDENT))
        in_order = halves[rows].tolist()
        assert in_order[: 2 * num_pairs] == [CONFIDENT, UNCONFIDENT] * num_pairs
        assert len(set(in_order[2 * num_pairs :]) - {NEITHER}) <= 1  # no two of the others could be partners

    def test_partners_are_drawn_anew_each_epoch(self):
        orders = [draw_order(random_halves(200, 0), seed, epoch) for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0))]
        partners = [set(zip(rows[::2], rows[1::2], strict=True)) for rows in orders]
        assert max(len(partners[i] & partners[j]) for i in range(4) for j in range(i)) < 30
        rows = draw_order(unknown, 0, 0)  # before the split is known
        assert sorted(rows) == list(range(50)) != rows

    @pytest.mark.parametrize("batch_size", [2, 4])
    @pytest.mark.parametrize("num_examples", [16, 24, 22])
    def test_whole_pairs_on_each_process(self, batch_size, num_examples):
        halves = random_halves(num_examples, 5)
        for process in range(3):
            batches = BatchSampler(draw_order(halves, 0, 0), batch_size, drop_last=False)
            for rows in BatchSamplerShard(batches, num_processes=3, process_index=process):
                assert halves[rows].tolist() == [CONFIDENT, UNCONFIDENT] * (batch_size // 2)


# Inside a micro-batch

ROWS = [
    {"input_ids": [11, 12, 13, 14], "labels": [-100, 12, 13, 14]},
    {"input_ids": [21, 22], "labels": [-100, -100]},
    {"input_ids": [31, 32, 33], "labels": [31, -100, 33]},
    {"input_ids": [41, 42, 43, 44, 45], "labels": [-100, -100, 43, 44, 45]},
]


def collate(rows, **options):
    inputs = DataCollatorForLanguageModeling(pad_token_id=0, **options)(rows)
    numbers = [[number] * len(row["input_ids"]) for number, row in enumerate(rows)]
    if inputs["input_ids"].size(0) == 1:
        numbers = [list(chain(*numbers))]
    inputs["example_number"] = torch.full(inputs["input_ids"].shape, -1)
    for row, values in enumerate(numbers):
        inputs["example_number"][row, : len(values)] = torch.tensor(values)
    return inputs


@pytest.mark.parametrize("options", [{}, {"padding_free": True}, {"padding_free": True, "pad_to_multiple_of": 8}])
def test_documents(options):
    inputs = collate(ROWS, **options)
    documents = documents_of(inputs, torch.tensor([1, 1, 0, -1], dtype=torch.int8))
    assert [(document.number, document.half) for document in documents] == [(0, 1), (2, 0), (3, -1)]
    labels = [inputs["labels"][:, 1:][tuple(document.positions.T)].tolist() for document in documents]
    assert labels == [[12, 13, 14], [33], [43, 44, 45]]
    assert all((document.positions[:, 1] < 0).all() for document in documents)  # from the end of the row
    without_numbers = documents_of(inputs, None)  # known by their tokens
    assert [document.half for document in without_numbers] == [CONFIDENT, UNCONFIDENT, CONFIDENT]
    padded = documents_of(collate(ROWS), None)
    assert [document.number for document in without_numbers] == [document.number for document in padded]
    assert len({document.number for document in padded}) == 3


def made_up_documents(halves):
    return [Document(i, half, torch.tensor([[i, -j] for j in range(i + 1, 0, -1)])) for i, half in enumerate(halves)]


def numbers_of(pairs):
    return tuple((first.number, second.number) for first, second in pairs)


class TestPairs:
    def test_in_order(self):
        documents = made_up_documents([1, 1, 0, -1, 1, 0])
        assert numbers_of(draw_pairs(documents, seed=0, step=0, shuffle=False)) == ((0, 2), (1, 5))

    @given(halves=halves_strategy, data=st.data())
    @settings(max_examples=30, deadline=None)
    def test_shuffled(self, halves, data):
        documents = made_up_documents(halves.tolist())
        pairs = draw_pairs(documents, seed=0, step=7, shuffle=True)
        assert all((first.half, second.half) == (CONFIDENT, UNCONFIDENT) for first, second in pairs)
        assert len(set(chain(*numbers_of(pairs)))) == 2 * len(pairs)
        assert len(pairs) == min((halves == half).sum() for half in (CONFIDENT, UNCONFIDENT))
        permuted = data.draw(st.permutations(documents))
        assert numbers_of(draw_pairs(permuted, seed=0, step=7, shuffle=True)) == numbers_of(pairs)

    def test_shuffled_anew_at_each_step(self):
        documents = made_up_documents([1, 0] * 10)
        assert len({numbers_of(draw_pairs(documents, 0, step, shuffle=True)) for step in range(9)}) == 9

    def test_positions_up_to_the_common_length(self):
        short, _, _, long = made_up_documents([1, -1, -1, 0])
        mixup = mixup_inputs([(short, long), (long, long)], 0.5, 0, 0, torch.device("cpu"))
        assert mixup["mixup_first"].tolist() == [[0, -1], [3, -4], [3, -3], [3, -2], [3, -1]]
        assert mixup["mixup_second"].tolist() == [[3, -4], [3, -4], [3, -3], [3, -2], [3, -1]]
        assert len(set(mixup["mixup_weights"])) == 2 and len(mixup["mixup_weights"]) == 5
        none = mixup_inputs([], 0.5, 0, 0, torch.device("cpu"))
        assert none["mixup_first"].shape == none["mixup_second"].shape == (0, 2)
        assert none["mixup_first"].dtype == torch.long and none["mixup_weights"] == []


class TestLambda:
    def draw(self, pairs, alpha=0.5, seed=0, step=0):
        documents = [[Document(number, 0, torch.tensor([[0, -1]])) for number in pair] for pair in pairs]
        return np.array(mixup_inputs(documents, alpha, seed, step, torch.device("cpu"))["mixup_weights"])

    @pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
    def test_is_beta_distributed_and_independent(self, alpha):
        pairs = [(first, second) for first in range(60) for second in range(60)]
        drawn = self.draw(pairs, alpha).reshape(60, 60)
        assert (drawn == drawn.astype(np.float32)).all() and ((drawn >= 0) & (drawn <= 1)).all()
        assert drawn.mean() == pytest.approx(0.5, abs=0.02)
        assert drawn.var() == pytest.approx(1 / (8 * alpha + 4), rel=0.06)
        for by_number in (drawn, drawn.T):  # neither the first nor the second number makes neighbours alike
            assert abs(np.corrcoef(by_number[1:].flatten(), by_number[:-1].flatten())[0, 1]) < 0.06

    def test_is_a_function_of_seed_step_and_numbers(self):
        first, second = self.draw([(3, 5), (5, 3)]), self.draw([(5, 3), (3, 5)])
        assert first[0] == second[1] != first[1] == second[0]
        assert self.draw([(3, 5)], step=1) != self.draw([(3, 5)]) != self.draw([(3, 5)], seed=1)
        assert self.draw([(3, 5)], seed=-1) == self.draw([(3, 5)], seed=-1)
