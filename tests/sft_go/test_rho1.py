import copy
import shutil
from functools import partial

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers import assert_same_gradients, make_trainer, one_step, padded_document_log_probs
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PromptTuningConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sft_variants import SFTGOConfig, SFTGOTrainer
from hf_sft_variants.errors import InputError
from hf_sft_variants.sft_go import reference_log_probs
from hf_sft_variants.sft_go.excess_loss import group_by_excess_loss


@pytest.fixture
def reference(tiny_model, tokenizer, tmp_path):
    """Folder of a model with other weights and the same tokenizer."""
    other = copy.deepcopy(tiny_model)
    generator = torch.Generator().manual_seed(5)
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    other.save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "reference")
    return other


@pytest.fixture
def make(options, tiny_model, tokenizer, tmp_path):
    """Makes a trainer of rows and options."""
    return partial(make_trainer, SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, output_dir=tmp_path, **options)


@pytest.fixture
def options(reference, tmp_path):
    return {
        "group_by": "rho1",
        "reference_model": str(tmp_path / "reference"),
        "score_cache_dir": str(tmp_path / "scores"),
        "special_tokens_important": False,
    }


@st.composite
def token_tables(draw):
    rows, length, num_segments = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    size = rows * length

    def one_per_token(values):
        return torch.tensor(draw(st.lists(values, min_size=size, max_size=size))).view(rows, length)

    # Few distinct values, so that ties are common
    return {
        "log_probs": -one_per_token(st.integers(0, 4)).float() / 2,
        "reference_log_probs": -one_per_token(st.integers(0, 4)).float() / 2,
        "group_ids": one_per_token(st.sampled_from([-1, 0, 0, 0, 1])),
        "segment_ids": one_per_token(st.integers(0, num_segments - 1)),
        "num_segments": num_segments,
    }


@given(table=token_tables(), fraction=st.floats(0.05, 0.95))
@settings(max_examples=200, deadline=None)
def test_ranking_equals_a_slow_one(table, fraction):
    result = group_by_excess_loss(**table, important_fraction=fraction).flatten().tolist()
    flat = {name: values.flatten().tolist() for name, values in table.items() if name != "num_segments"}
    excess = [r - p for r, p in zip(flat["reference_log_probs"], flat["log_probs"], strict=True)]
    expected = [-1] * len(excess)
    for scope in range(table["num_segments"]):
        tokens = [t for t in range(len(excess)) if flat["segment_ids"][t] == scope and flat["group_ids"][t] >= 0]
        ranked = sorted(tokens, key=lambda t: (flat["group_ids"][t] != 1, -excess[t], t))
        num_important = min(max(round(fraction * len(tokens)), 1), len(tokens) - 1)
        for rank, t in enumerate(ranked):
            expected[t] = int(rank < num_important)
    assert result == expected


@pytest.mark.parametrize("layout", [{}, {"packing": True}], ids=["padded", "packed"])
@pytest.mark.parametrize("scope", ["sample", "micro_batch"])
@pytest.mark.parametrize("weight", [0.6, 1.0])
def test_loss_equals_rho1_from_the_models_logits(
    layout, scope, weight, options, reference, tiny_model, tokenizer, token_rows, tmp_path
):
    """With λ = 1: the mean loss of the share of tokens with the highest excess loss, as Rho-1 defines it."""
    rows = token_rows.select([0, 2, 4, 6])
    samples = []
    for row in rows:
        ours, theirs = (
            padded_document_log_probs(model, row["input_ids"], row["labels"]) for model in (tiny_model, reference)
        )
        samples.append([(-p, r - p) for p, r in zip(ours, theirs, strict=True) if p is not None])
    scopes = [[token for sample in samples for token in sample]] if scope == "micro_batch" else samples
    expected = 0.0
    for tokens in scopes:
        selected = sorted(tokens, key=lambda token: -token[1])[: round(0.4 * len(tokens))]
        rho1 = sum(nll for nll, _ in selected) / len(selected)
        expected += weight * len(tokens) * rho1 + (1 - weight) * sum(nll for nll, _ in tokens)
    loss, _ = one_step(
        SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, rows, tmp_path, important_fraction=0.4,
        group_scope=scope, worst_group_weight=weight, per_device_train_batch_size=4, **options, **layout,
    )  # fmt: skip
    assert loss == pytest.approx(expected / sum(len(sample) for sample in samples), rel=1e-5)


def test_every_split_of_a_batch(options, tiny_model, tokenizer, token_rows, tmp_path):
    common = (SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, token_rows.select(range(8)), tmp_path)
    loss, gradients = one_step(*common, per_device_train_batch_size=8, **options)
    for split in (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 3, "packing": True},
    ):
        split_loss, split_gradients = one_step(*common, **options, **split)
        assert split_loss == pytest.approx(loss, rel=1e-6)
        assert_same_gradients(split_gradients, gradients, tolerance=1e-6)


def num_scored(folder):
    return sum(len(pq.read_table(path)) for path in (folder / "scores").rglob("*.parquet"))


class TestScores:
    def test_are_computed_once(self, make, token_rows, tmp_path, monkeypatch):
        first = make(token_rows, eval_dataset=token_rows.select([2]))
        assert num_scored(tmp_path) == len(token_rows)  # the row of the evaluation set is one of them
        monkeypatch.setattr(reference_log_probs, "load_reference_model", None)  # must not be called again
        again = make(token_rows, important_fraction=0.2, max_steps=1, packing=True)
        again.train()
        assert sum(map(len, again.train_dataset["reference_log_probs"])) == sum(
            map(len, first.train_dataset["reference_log_probs"])
        )

    def test_other_truncation_scores_what_it_cuts(self, make, token_rows, tmp_path):
        make(token_rows)
        short = make(token_rows, max_length=12)
        num_cut = sum(len(ids) > 12 for ids in token_rows["input_ids"])
        assert num_scored(tmp_path) == len(token_rows) + num_cut
        for row in short.train_dataset:
            assert len(row["reference_log_probs"]) == len(row["input_ids"]) <= 12

    def test_changed_weights_score_again(self, make, tiny_model, tokenizer, token_rows, tmp_path):
        make(token_rows)
        shutil.rmtree(tmp_path / "reference")
        tiny_model.save_pretrained(tmp_path / "reference")
        tokenizer.save_pretrained(tmp_path / "reference")
        make(token_rows)
        assert num_scored(tmp_path) == 2 * len(token_rows)

    def test_equal_rows_and_shuffling(self, make, reference, token_rows):
        for row in make(token_rows.select([4, 2, 4, 0]), shuffle_dataset=True).train_dataset:
            expected = padded_document_log_probs(reference, row["input_ids"], row["labels"])
            expected = [0.0] + [0.0 if value is None else value for value in expected]
            assert row["reference_log_probs"] == pytest.approx(expected, abs=1e-5)

    def test_two_hundred_random_texts(self, make, reference, random_texts):
        rows = make(Dataset.from_dict({"text": random_texts}), score_batch_tokens=300).train_dataset
        assert len(rows) == 200
        for row in rows:
            expected = padded_document_log_probs(reference, row["input_ids"], row["labels"])
            assert row["reference_log_probs"] == pytest.approx([0.0, *expected], abs=1e-5)

    def test_second_start_prepares_nothing_again(self, make, token_rows, tmp_path):
        token_rows.save_to_disk(tmp_path / "data")
        first, second = (make(load_from_disk(tmp_path / "data")).train_dataset for _ in range(2))
        assert first._fingerprint == second._fingerprint


class TestBadInput:
    def test_another_vocabulary(self, make, tokenizer, token_rows, tmp_path):
        other = copy.deepcopy(tokenizer)
        other.add_tokens(["<new>"])
        other.save_pretrained(tmp_path / "reference")
        with pytest.raises(ValueError, match="has another vocabulary than the trained model: 331 tokens against 330"):
            make(token_rows)

    def test_a_folder_without_a_model(self, make, token_rows, tmp_path):
        (tmp_path / "reference" / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"The reference model .* can't be loaded"):
            make(token_rows)

    def test_more_tokens_than_the_reference_has_positions(self, make, tokenizer, token_rows, tmp_path, caplog):
        """GPT-2 has an embedding for each position, and none for those behind."""
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=20, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "reference")
        trainer = make(token_rows)
        fitting = [ids for ids in token_rows["input_ids"] if len(ids) <= 20]
        assert list(trainer.train_dataset["input_ids"]) == fitting and len(fitting) == 10
        assert "6 of 16 examples of the train dataset can't be scored: 6 by" in caplog.text
        long = token_rows.select([0, 8])
        with pytest.raises(InputError, match="2 of 2 examples of the train dataset can't be scored: 2 by .* Raise"):
            make(long)

    def test_virtual_tokens_take_positions(self, make, tokenizer, token_rows, tmp_path, caplog):
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=25, n_embd=16, n_layer=1, n_head=2, eos_token_id=0)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
        base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        (tmp_path / "reference" / "config.json").unlink()
        adapter = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
        adapter.save_pretrained(tmp_path / "reference")
        make(token_rows)
        assert "6 of 16 examples of the train dataset can't be scored: 6 by" in caplog.text

    def test_streaming(self, make, token_rows):
        rows = token_rows.to_iterable_dataset()
        with pytest.raises(ValueError, match="The train dataset is a stream, but all its examples have to be scored"):
            make(rows, max_steps=1)

    def test_a_stream_of_prepared_rows(self, make, token_rows):
        prepared = make(token_rows, packing=True).train_dataset
        stream = make(prepared.to_iterable_dataset(), packing=True, max_steps=1).train_dataset
        assert next(iter(stream))["reference_log_probs"] == prepared[0]["reference_log_probs"]

    def test_an_evaluation_stream_is_refused_before_anything_is_scored(self, make, token_rows, monkeypatch):
        monkeypatch.setattr("hf_sft_variants.sft_go.trainer.reference_log_probs", None)
        evaluation = {"first": token_rows, "second": token_rows.to_iterable_dataset()}
        with pytest.raises(InputError, match="The second dataset is a stream, but all its examples have to be scored"):
            make(token_rows, eval_dataset=evaluation)
