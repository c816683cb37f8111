import copy
import errno
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from filelock import FileLock
from helpers import commit_of, padded_document_log_probs
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from hf_sft_variants.errors import InputError
from hf_sft_variants.scoring import (
    LogProbScorer,
    cached_scores,
    identify_model,
    load_reference_model,
    locks,
    shards,
)
from hf_sft_variants.scoring.cached_scores import token_keys


SETTINGS = {"kind": "test"}


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(value):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.fixture(autouse=True)
def process_state():
    PartialState(cpu=True)


class TestPlan:
    @given(lengths=st.lists(st.integers(0, 60), max_size=200), batch_tokens=st.integers(1, 200))
    @settings(max_examples=100, deadline=None)
    def test_every_row_once_and_within_the_budget(self, lengths, batch_tokens):
        plan = shards.plan_shards(lengths, batch_tokens)
        batches = [batch for shard in plan for batch in shard]
        rows = [row for batch in batches for row in batch]
        assert sorted(rows) == list(range(len(lengths)))
        assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
        for batch in batches:
            assert len(batch) == 1 or max(lengths[row] for row in batch) * len(batch) <= batch_tokens


class TestLogProbs:
    def expected(self, model, row):
        log_probs = padded_document_log_probs(model, row["input_ids"], row["labels"])
        return [0.0] + [0.0 if log_prob is None else log_prob for log_prob in log_probs]

    @pytest.mark.parametrize("padding_free", [False, True])
    def test_equal_to_the_models_logits(self, padding_free, tiny_model, token_rows):
        plain_model = copy.deepcopy(tiny_model)
        scorer = LogProbScorer(tiny_model, per_token=True, padding_free=padding_free)
        for row, result in zip(token_rows, scorer(list(token_rows)), strict=True):
            expected = self.expected(plain_model, row)
            assert result["token_log_probs"].tolist() == pytest.approx(expected, abs=1e-5)
            assert result["sum_log_prob"] == pytest.approx(sum(expected), abs=1e-4)
            assert result["num_tokens"] == sum(label != -100 for label in row["labels"][1:])

    @pytest.mark.parametrize("padding_free", [False, True])
    def test_most_likely_tokens(self, padding_free, tiny_model, token_rows):
        scorer = LogProbScorer(copy.deepcopy(tiny_model), per_token=True, padding_free=padding_free, top=True)
        plain = LogProbScorer(copy.deepcopy(tiny_model), per_token=True)(list(token_rows))
        for row, result, without in zip(token_rows, scorer(list(token_rows)), plain, strict=True):
            assert result["token_log_probs"] == pytest.approx(without["token_log_probs"], abs=1e-5)
            with torch.no_grad():
                logits = tiny_model(torch.tensor([row["input_ids"]])).logits[0, :-1]
            expected = [0.0, *logits.log_softmax(-1).amax(-1).tolist()]
            expected = [x if label != -100 else 0.0 for x, label in zip(expected, row["labels"], strict=True)]
            assert result["top_log_probs"] == pytest.approx(expected, abs=1e-5)
            assert "top_log_probs" not in without

    def test_batch_size_and_order_do_not_matter(self, tiny_model, token_rows, tmp_path):
        expected = score(token_rows, tmp_path / "a", 30, scorer=LogProbScorer(tiny_model, per_token=True)).to_pylist()
        assert [len(row["token_log_probs"]) for row in expected] == [len(ids) for ids in token_rows["input_ids"]]
        shuffled = list(range(len(token_rows)))[::-1]
        for number, (rows, batch_tokens) in enumerate([(range(len(token_rows)), 400), (shuffled, 90)]):
            scorer = LogProbScorer(tiny_model, per_token=True)
            table = score(token_rows.select(rows), tmp_path / str(number), batch_tokens, scorer=scorer).to_pylist()
            for row, found in zip(rows, table, strict=True):
                assert found["token_log_probs"] == pytest.approx(expected[row]["token_log_probs"], abs=1e-5)

    def test_adapter_is_used(self, tiny_model, token_rows):
        plain = LogProbScorer(copy.deepcopy(tiny_model))(list(token_rows))
        adapted = get_peft_model(tiny_model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        assert LogProbScorer(adapted)(list(token_rows))[0]["sum_log_prob"] != plain[0]["sum_log_prob"]

    def test_memory_does_not_grow_with_vocabulary_times_tokens(self):
        """No tensor is as large as the logits: the LM head is run in tiles."""
        vocab_size, num_tokens = 50_000, 2_000
        config = LlamaConfig(
            vocab_size=vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=num_tokens,
        )  # fmt: skip
        scorer = LogProbScorer(LlamaForCausalLM(config))
        tokens = list(range(num_tokens))
        with LargestTensor() as largest:
            scorer([{"input_ids": tokens, "labels": tokens}])
        assert num_tokens < largest.numel < vocab_size * num_tokens / 2

    def test_file_is_as_documented(self, tiny_model, token_rows, tmp_path):
        score(token_rows, tmp_path / "new", 100, scorer=LogProbScorer(tiny_model, per_token=True))
        (path,) = (tmp_path / "new").rglob("*.parquet")
        table = pq.read_table(path)
        assert table.schema.names == ["example_key", "sum_log_prob", "num_tokens", "token_log_probs"]
        assert table.schema.types == [pa.string(), pa.float64(), pa.int64(), pa.list_(pa.float32())]
        assert set(table["example_key"].to_pylist()) == set(token_keys(token_rows))
        assert json.loads(table.schema.metadata[b"hf_sft_variants"]) == SETTINGS
        assert {file.name for file in path.parent.iterdir()} == {path.name, ".lock"}


class CountingScorer:
    """Scores an example by its first token, and keeps those that it has scored; is stopped after some batches."""

    def __init__(self, num_batches=99):
        self.scored, self.num_batches = [], num_batches

    def __call__(self, examples):
        if self.num_batches == 0:
            raise KeyboardInterrupt
        self.num_batches -= 1
        self.scored += [example["input_ids"] for example in examples]
        return [{"first": example["input_ids"][0]} for example in examples]


def score(rows, folder, batch_tokens=40, scorer=None, settings=SETTINGS, **options):
    """Scores; without a scorer they have to be there."""
    return cached_scores(rows, lambda: scorer or pytest.fail("a model"), folder, settings, batch_tokens, "", **options)


def first_tokens(rows):
    return [ids[0] for ids in rows["input_ids"]]


class TestCachedScores:
    def test_belong_to_the_tokens_they_were_made_of(self, token_rows, tmp_path):
        """One row more, rows in another order, a duplicate, or another batch: only what is new is scored, and once."""
        scorer = CountingScorer()
        assert score(token_rows.select(range(8)), tmp_path, scorer=scorer)["first"].to_pylist() == first_tokens(
            token_rows.select(range(8))
        )
        assert len(scorer.scored) == 8
        rows = token_rows.select([9, 3, 3, 9, 0])
        assert score(rows, tmp_path, 300, scorer)["first"].to_pylist() == first_tokens(rows)
        assert scorer.scored[8:] == [token_rows["input_ids"][9]]
        assert score(rows, tmp_path)["first"].to_pylist() == first_tokens(rows)  # without a model

    def test_truncation_makes_another_example(self, token_rows, tmp_path):
        scorer, cut = CountingScorer(), {"input_ids": slice(None, 9), "labels": slice(None, 9)}
        score(token_rows, tmp_path, scorer=scorer)
        short = token_rows.map(lambda row: {name: row[name][kept] for name, kept in cut.items()})
        score(short, tmp_path, scorer=scorer)
        assert sorted(scorer.scored[16:]) == sorted(ids[:9] for ids in token_rows["input_ids"] if len(ids) > 9)

    def test_other_labels_make_another_example(self, token_rows, tmp_path):
        scorer = CountingScorer()
        score(token_rows.select([0]), tmp_path, scorer=scorer)
        score(token_rows.select([0]).map(lambda row: {"labels": row["input_ids"]}), tmp_path, scorer=scorer)
        assert len(scorer.scored) == 2

    def test_what_can_not_be_scored_is_null(self, token_rows, tmp_path):
        """Without a label that is predicted, or with more tokens than the model can read."""
        rows = list(token_rows.select([0, 1, 2]))
        rows[1] = {"input_ids": [5, 6, 7], "labels": [5, -100, -100]}
        rows, scorer = Dataset.from_list(rows), CountingScorer()
        table = score(rows, tmp_path, scorer=scorer, max_tokens=20)
        assert table["first"].to_pylist() == [None, None, rows["input_ids"][2][0]] and len(scorer.scored) == 1
        with pytest.raises(InputError, match="no example has a supervised token and at most 2 tokens"):
            score(rows, tmp_path, scorer=scorer, max_tokens=2)

    def test_other_settings_score_again(self, token_rows, tmp_path):
        scorer = CountingScorer()
        for others in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}):
            score(token_rows, tmp_path, scorer=scorer, settings=others)
        assert len(scorer.scored) == 2 * len(token_rows)

    def test_a_stopped_run_goes_on(self, token_rows, tmp_path, monkeypatch):
        monkeypatch.setattr(shards, "BATCHES_PER_SHARD", 2)
        with pytest.raises(KeyboardInterrupt):
            score(token_rows, tmp_path, scorer=CountingScorer(num_batches=5))
        paths, resumed = list(tmp_path.rglob("*.parquet")), CountingScorer()
        assert len(paths) == 2  # the fifth batch is lost
        assert score(token_rows, tmp_path, scorer=resumed)["first"].to_pylist() == first_tokens(token_rows)
        assert len(resumed.scored) == len(token_rows) - sum(len(pq.read_table(path)) for path in paths)

    def test_full_disk(self, token_rows, tmp_path, monkeypatch):
        def no_space(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(shards.pq, "write_table", no_space)
        with pytest.raises(InputError, match=r"Scores can't be written to .*: the disk is full. .* `score_cache_dir`"):
            score(token_rows, tmp_path, scorer=CountingScorer())

    def test_folder_that_is_a_file(self, token_rows, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=r"Scores can't be written to .*: (File exists|Not a directory)"):
            score(token_rows, tmp_path / "file")

    def test_file_with_other_options(self, token_rows, tmp_path):
        """Copied by hand, say."""
        score(token_rows, tmp_path, scorer=CountingScorer(), settings={"dtype": "a", "same": 1})
        (folder,) = tmp_path.iterdir()
        folder.rename(shards.settings_folder(tmp_path, {"dtype": "b", "same": 1}))
        with pytest.raises(InputError, match="written with other options: dtype was 'a', is now 'b'. Delete"):
            score(token_rows, tmp_path, settings={"dtype": "b", "same": 1})

    @pytest.mark.parametrize("kept", [0, 4, -20])
    def test_broken_file(self, kept, token_rows, tmp_path):
        score(token_rows, tmp_path, scorer=CountingScorer())
        (path,) = tmp_path.rglob("*.parquet")
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(InputError, match=rf"{path.name} can't be read .* Delete the file"):
            score(token_rows, tmp_path)


class TestLock:
    """Another run holds the lock, until it is told that this one waits."""

    @pytest.fixture
    def other_run(self, token_rows, tmp_path, monkeypatch):
        """Lets the other run finish, after three tries, when it has scored so many rows."""
        monkeypatch.setattr(locks, "LOCK_SECONDS", 0.01)
        folder = shards.settings_folder(tmp_path, SETTINGS)
        folder.mkdir()
        lock, tries, try_to_lock = FileLock(folder / ".lock"), [], locks._try_to_lock
        lock.acquire()

        def finish_after(num_rows):
            def try_and_count(*arguments):
                tries.append(1)
                if len(tries) == 3:
                    score_without_lock(token_rows.select(range(num_rows)), tmp_path, monkeypatch)
                    lock.release()
                return try_to_lock(*arguments)

            monkeypatch.setattr(locks, "_try_to_lock", try_and_count)
            return tries

        return finish_after

    def test_waits_without_a_model_and_finds_the_scores(self, other_run, token_rows, tmp_path, caplog):
        tries = other_run(len(token_rows))
        assert score(token_rows, tmp_path)["first"].to_pylist() == first_tokens(token_rows)
        assert len(tries) == 3 and caplog.text.count("Waiting for another run that makes scores in") == 1
        assert len(list(tmp_path.rglob(".lock"))) == 1

    def test_scores_what_the_other_run_has_left(self, other_run, token_rows, tmp_path):
        tries, scorer = other_run(10), CountingScorer()
        assert score(token_rows, tmp_path, scorer=scorer)["first"].to_pylist() == first_tokens(token_rows)
        assert len(scorer.scored) == len(token_rows) - 10 and len(tries) == 3

    def test_no_lock_where_nothing_is_missing(self, token_rows, tmp_path):
        score(token_rows, tmp_path, scorer=CountingScorer())
        (path,) = tmp_path.rglob(".lock")
        with FileLock(path):
            score(token_rows, tmp_path)


def score_without_lock(rows, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(locks, "_try_to_lock", lambda *arguments: True)
        score(rows, folder, scorer=CountingScorer())


class TestReferenceModels:
    def test_identity_is_of_the_content(self, tiny_model, tmp_path):
        tiny_model.save_pretrained(tmp_path / "model")
        saved = identify_model(str(tmp_path / "model"))
        in_bfloat16 = identify_model(str(tmp_path / "model"), {"dtype": torch.bfloat16})
        assert in_bfloat16 != saved
        assert identify_model(str(tmp_path / "model"), {"dtype": "bfloat16"}) == in_bfloat16
        # What stands in the files of scores is no secret, and nothing that leaves the scores as they are
        elsewhere = {"token": "hf_secret", "device_map": "auto", "offload_folder": "/tmp", "cache_dir": "/tmp"}
        assert identify_model(str(tmp_path / "model"), elsewhere) == saved
        shutil.copytree(tmp_path / "model", tmp_path / "other" / "copy", copy_function=shutil.copy)
        os.utime(tmp_path / "other" / "copy" / "model.safetensors", ns=(1, 1))
        for path in (f"{tmp_path}/model/", f"{tmp_path}/other/../model", f"{tmp_path}/other/copy"):
            assert identify_model(path) == saved
        tiny_model.model.layers[0].mlp.up_proj.weight.data += 1
        tiny_model.save_pretrained(tmp_path / "model")
        assert identify_model(str(tmp_path / "model")) != saved

    def test_loads_models_and_adapters(self, tiny_model, token_rows, tmp_path):
        tiny_model.save_pretrained(tmp_path / "base")
        base = load_reference_model(str(tmp_path / "base"))
        assert base.dtype == torch.float32 and not base.training
        assert not any(parameter.requires_grad for parameter in base.parameters())
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        adapted.save_pretrained(tmp_path / "adapter")
        loaded = load_reference_model(str(tmp_path / "adapter"))
        first, second = (LogProbScorer(model)(list(token_rows))[0]["sum_log_prob"] for model in (adapted, loaded))
        assert first == pytest.approx(second)

    def test_identity_of_an_adapter_has_its_base(self, tiny_model, tmp_path):
        for name in ("base", "copy"):
            tiny_model.save_pretrained(tmp_path / name)
            base = load_reference_model(str(tmp_path / name))
            torch.manual_seed(1)
            adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
            adapted.save_pretrained(tmp_path / f"adapter_of_{name}")
        before = identify_model(str(tmp_path / "adapter_of_base"))
        assert identify_model(str(tmp_path / "adapter_of_copy")) == before
        tiny_model.model.norm.weight.data += 1
        tiny_model.save_pretrained(tmp_path / "base")
        assert identify_model(str(tmp_path / "adapter_of_base")) != before

    def test_ids_of_the_hub(self, tiny_model, token_rows, tmp_path, monkeypatch):
        """A model and an adapter by their ids, each known by its commit, from the cache of the Hub."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        tiny_model.save_pretrained(commit_of(tmp_path / "models--org--base", "a"))
        base = load_reference_model("org/base")
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        adapted.save_pretrained(commit_of(tmp_path / "models--org--adapter", "b"))
        first, second = (
            LogProbScorer(load_reference_model(id))(list(token_rows)) for id in ("org/base", "org/adapter")
        )
        assert first[0]["sum_log_prob"] != second[0]["sum_log_prob"]
        of_base, of_adapter = identify_model("org/base"), identify_model("org/adapter")
        assert of_base | {"model": "org/base", "version": "a" * 40} == of_base
        assert of_adapter | {"version": "b" * 40, "base": f"org/base {'a' * 40}"} == of_adapter
        for name, before in (("base", "a"), ("adapter", "b")):
            repository = tmp_path / f"models--org--{name}"
            shutil.copytree(repository / "snapshots" / (before * 40), commit_of(repository, "c"), dirs_exist_ok=True)
        assert identify_model("org/base")["version"] == identify_model("org/adapter")["version"] == "c" * 40
        assert identify_model("org/base", {"revision": "a" * 40})["version"] == "a" * 40

    @pytest.mark.parametrize("offloaded", ["cpu", "disk"])
    def test_a_dispatched_model_keeps_its_places(self, offloaded, tiny_model, token_rows, tmp_path):
        """Parts of it are on disk, and used from there; the model's files stay as they are."""
        tiny_model.config.tie_word_embeddings = False
        tiny_model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(tiny_model.lm_head.weight))
        tiny_model.save_pretrained(tmp_path / "base")
        name, before = str(tmp_path / "base"), identify_model(str(tmp_path / "base"))
        places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk"}
        places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": offloaded}
        options = {"device_map": places, "offload_folder": str(tmp_path / "offloaded")}
        dispatched = load_reference_model(name, options)
        embeddings = dispatched.get_input_embeddings()
        assert embeddings.weight.device.type == "meta"
        assert (dispatched.get_output_embeddings().weight.device.type == "meta") == (offloaded == "disk")
        expected, scores = (
            [result["sum_log_prob"] for result in LogProbScorer(model)(list(token_rows))]
            for model in (load_reference_model(name), dispatched)
        )
        assert scores == pytest.approx(expected, rel=1e-6)  # heads that are not offloaded are run in tiles
        assert embeddings.weight.device.type == "meta"
        assert identify_model(name) == before
        adapter = str(tmp_path / "adapter")
        config = LoraConfig(r=2, target_modules="all-linear")
        get_peft_model(load_reference_model(name), config).save_pretrained(adapter)
        with pytest.raises(InputError, match="its base model is offloaded: merge the adapter into it, or use another"):
            load_reference_model(adapter, options)
        assert identify_model(name) == before

    def test_missing_weights(self, tiny_model, tmp_path):
        tiny_model.config.tie_word_embeddings = False
        LlamaForSequenceClassification(tiny_model.config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"it lacks the weights \['lm_head.weight'\], which would be random"):
            load_reference_model(str(tmp_path))

    def test_four_bits(self, token_rows, tmp_path):
        config = LlamaConfig(
            vocab_size=330, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        quantized = load_reference_model(str(tmp_path), {"quantization_config": quantization})
        assert quantized.is_loaded_in_4bit
        scores = [
            LogProbScorer(model)([token_rows[0]])[0]["sum_log_prob"]
            for model in (load_reference_model(str(tmp_path)), quantized)
        ]
        assert scores[1] == pytest.approx(scores[0], rel=0.1) and scores[1] != scores[0]

    def test_no_model(self, tmp_path):
        with pytest.raises(ValueError, match=r"The reference model .* can't be loaded"):
            load_reference_model(str(tmp_path))

    def test_under_zero_3(self, tmp_path, monkeypatch):
        monkeypatch.setattr("hf_sft_variants.scoring.reference_model.is_deepspeed_zero3_enabled", lambda: True)
        with pytest.raises(ValueError, match="can't be loaded under DeepSpeed ZeRO-3. Run `hf-sft-variants score"):
            load_reference_model(str(tmp_path))
