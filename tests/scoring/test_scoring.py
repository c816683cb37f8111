import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from helpers import padded_document_log_probs
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from hf_sft_variants.errors import InputError
from hf_sft_variants.scoring import (
    EXAMPLE_KEY,
    LogProbScorer,
    add_example_keys,
    identify_model,
    join_scores,
    load_reference_model,
    read_scores,
    score_in_shards,
    score_log_probs,
    scores_path,
    shards,
)


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


@pytest.fixture(scope="module")
def keyed_rows(token_rows):
    return add_example_keys(token_rows, ["input_ids", "labels"])


class TestKeys:
    def test_equal_rows_are_numbered(self):
        rows = Dataset.from_dict({"a": ["x", "y", "x", "x"], "b": [1, 1, 1, 2]})
        keys = add_example_keys(rows, ["a", "b"])[EXAMPLE_KEY]
        assert len(set(keys)) == 4
        assert [key.split("-")[1] for key in keys] == ["0", "0", "1", "0"]
        assert keys[0].split("-")[0] == keys[2].split("-")[0]

    def test_keys_depend_on_content_alone(self):
        rows = Dataset.from_dict({"a": ["x", "y", "z"], "other": [1, 2, 3]})
        keys = dict(zip(rows["a"], add_example_keys(rows, ["a"])[EXAMPLE_KEY], strict=True))
        reversed_rows = Dataset.from_dict({"other": [7, 8, 9], "a": ["z", "y", "x"]})
        assert dict(zip(reversed_rows["a"], add_example_keys(reversed_rows, ["a"])[EXAMPLE_KEY], strict=True)) == keys

    def test_second_start_finds_the_keys(self, token_rows, tmp_path):
        token_rows.save_to_disk(tmp_path)
        fingerprints = {add_example_keys(Dataset.load_from_disk(tmp_path), ["input_ids"])._fingerprint for _ in "ab"}
        assert len(fingerprints) == 1


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

    def test_batch_size_and_order_do_not_matter(self, tiny_model, keyed_rows, tmp_path):
        tables = []
        for number, (rows, batch_tokens) in enumerate(
            [(keyed_rows, 30), (keyed_rows, 400), (keyed_rows.shuffle(seed=3), 90)]
        ):
            table = score_log_probs(rows, tiny_model, tmp_path / f"{number}.parquet", SETTINGS, batch_tokens, True, "")
            tables.append({row[EXAMPLE_KEY]: row for row in table.to_pylist()})
        for other in tables[1:]:
            assert other.keys() == tables[0].keys()
            for key, row in other.items():
                assert row["token_log_probs"] == pytest.approx(tables[0][key]["token_log_probs"], abs=1e-5)

    def test_adapter_is_used(self, tiny_model, token_rows):
        plain = LogProbScorer(copy.deepcopy(tiny_model))(list(token_rows))
        adapted = get_peft_model(tiny_model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        assert LogProbScorer(adapted)(list(token_rows))[0]["sum_log_prob"] != plain[0]["sum_log_prob"]

    def test_memory_does_not_grow_with_vocabulary_times_tokens(self):
        """No tensor is as large as the logits: the LM head is run in tiles."""
        vocab_size, num_tokens = 100_000, 3_000
        config = LlamaConfig(
            vocab_size=vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=num_tokens,
        )  # fmt: skip
        scorer = LogProbScorer(LlamaForCausalLM(config))
        tokens = list(range(num_tokens))
        with LargestTensor() as largest:
            scorer([{"input_ids": tokens, "labels": tokens}])
        assert num_tokens * num_tokens < largest.numel < vocab_size * num_tokens / 2

    def test_file_is_as_documented(self, tiny_model, keyed_rows, tmp_path):
        path = tmp_path / "new" / "scores.parquet"
        score_log_probs(keyed_rows, tiny_model, path, SETTINGS, 100, True, "")
        table = pq.read_table(path)
        assert table.schema.names == ["example_key", "sum_log_prob", "num_tokens", "token_log_probs"]
        assert table.schema.types == [pa.string(), pa.float64(), pa.int64(), pa.list_(pa.float32())]
        assert table["example_key"].to_pylist() == list(keyed_rows[EXAMPLE_KEY])
        assert json.loads(table.schema.metadata[b"hf_sft_variants"]) == SETTINGS
        assert [file.name for file in path.parent.iterdir()] == ["scores.parquet"]


KILLED_RUN = """
import os, signal, sys
from accelerate import PartialState
from datasets import Dataset
from hf_sft_variants.scoring import score_in_shards, shards
from pathlib import Path

folder, survives = Path(sys.argv[1]), int(sys.argv[2])
PartialState(cpu=True)
shards.BATCHES_PER_SHARD = 2
scored = []

def score_batch(examples):
    if len(scored) == survives:
        os.kill(os.getpid(), signal.SIGKILL)
    scored.append(len(examples))
    return [{"first": example["input_ids"][0]} for example in examples]

rows = Dataset.from_json(str(folder / "rows.jsonl"), cache_dir=str(folder / "cache"))
score_in_shards(rows, score_batch, folder / "scores.parquet", {"kind": "test"}, 40, "")
print(len(scored))
"""


class TestShards:
    def test_killed_run_goes_on(self, keyed_rows, tmp_path):
        def run(folder, survives):
            command = [sys.executable, "-c", KILLED_RUN, str(folder), str(survives)]
            return subprocess.run(command, capture_output=True, text=True)

        folders = [tmp_path / "killed", tmp_path / "unbroken"]
        for folder in folders:
            folder.mkdir()
            keyed_rows.to_json(folder / "rows.jsonl")
        assert run(folders[0], survives=5).returncode == -signal.SIGKILL
        (shard_folder,) = folders[0].glob("scores.parquet.shards-*")
        assert len(list(shard_folder.iterdir())) == 2  # of two batches each
        resumed, unbroken = run(folders[0], survives=99), run(folders[1], survives=99)
        num_batches = [int(result.stdout.splitlines()[-1]) for result in (resumed, unbroken)]
        assert num_batches[0] == num_batches[1] - 4
        assert (folders[0] / "scores.parquet").read_bytes() == (folders[1] / "scores.parquet").read_bytes()
        assert not shard_folder.exists()

    @pytest.mark.parametrize(("seed", "batch_tokens"), [(None, 90), (3, 40)], ids=["other_budget", "other_order"])
    def test_shards_of_another_plan_are_not_mixed_in(self, seed, batch_tokens, keyed_rows, tmp_path, monkeypatch):
        monkeypatch.setattr(shards, "BATCHES_PER_SHARD", 1)
        path, scored = tmp_path / "scores.parquet", []

        def score_batch(examples):
            if len(scored) == 5:
                raise KeyboardInterrupt
            scored.append(len(examples))
            return [{"first": example["input_ids"][0]} for example in examples]

        with pytest.raises(KeyboardInterrupt):
            score_in_shards(keyed_rows, score_batch, path, SETTINGS, 40, "")
        scored.extend([0] * 9)
        rows = keyed_rows if seed is None else keyed_rows.shuffle(seed=seed)
        table = score_in_shards(rows, score_batch, path, SETTINGS, batch_tokens, "")
        assert table["first"].to_pylist() == [ids[0] for ids in rows["input_ids"]]
        assert [file.name for file in tmp_path.iterdir()] == ["scores.parquet"]

    def test_another_run_wrote_the_file_meanwhile(self, keyed_rows, tmp_path):
        path = tmp_path / "scores.parquet"
        score_in_shards(keyed_rows, lambda rows: [{"a": 1} for _ in rows], path, SETTINGS, 50, "")
        assert score_in_shards(keyed_rows, None, path, SETTINGS, 50, "")["a"].to_pylist() == [1] * len(keyed_rows)

    def test_full_disk(self, keyed_rows, tmp_path, monkeypatch):
        def no_space(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(shards.pq, "write_table", no_space)
        with pytest.raises(InputError, match=r"Scores can't be written to .*: the disk is full. .* `score_cache_dir`"):
            score_in_shards(keyed_rows, lambda rows: [{"a": 1} for _ in rows], tmp_path / "s", SETTINGS, 50, "")

    def test_folder_that_is_a_file(self, keyed_rows, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=r"Scores can't be written to .*: (File exists|Not a directory)"):
            score_in_shards(keyed_rows, None, tmp_path / "file" / "scores.parquet", SETTINGS, 50, "")

    def test_file_with_other_options(self, keyed_rows, tmp_path):
        path = tmp_path / "scores.parquet"
        score_in_shards(keyed_rows, lambda rows: [{"a": 1} for _ in rows], path, {"dtype": "a", "same": 1}, 50, "")
        with pytest.raises(ValueError, match="written with other options: dtype was 'a', is 'b'. Delete"):
            read_scores(path, {"dtype": "b", "same": 1})

    @pytest.mark.parametrize("content", [b"", b"PAR1 no parquet"])
    def test_broken_file(self, content, tmp_path):
        (tmp_path / "scores.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"scores\.parquet can't be read"):
            read_scores(tmp_path / "scores.parquet", SETTINGS)

    def test_broken_shard(self, keyed_rows, tmp_path, monkeypatch):
        """What a run that was stopped has left is damaged before the next one puts it together."""
        monkeypatch.setattr(shards, "BATCHES_PER_SHARD", 1)

        def score_batch(examples):
            for file in tmp_path.rglob("00000.parquet"):
                file.write_bytes(b"PAR1 no parquet")
            return [{"a": 1} for _ in examples]

        with pytest.raises(ValueError, match=r"00000.parquet, a part of the scores, can't be read .* Delete the file"):
            score_in_shards(keyed_rows, score_batch, tmp_path / "scores.parquet", SETTINGS, 40, "")

    def test_truncated_file(self, keyed_rows, tmp_path):
        path = tmp_path / "scores.parquet"
        score_in_shards(keyed_rows, lambda rows: [{"a": 1} for _ in rows], path, SETTINGS, 50, "")
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match="can't be read"):
            read_scores(path, SETTINGS)

    def test_paths_tell_settings_and_examples_apart(self, keyed_rows, tmp_path):
        same = scores_path(tmp_path, {"a": 1, "b": 2}, keyed_rows)
        assert scores_path(tmp_path, {"b": 2, "a": 1}, keyed_rows.shuffle(seed=0)) == same
        shorter = keyed_rows.map(lambda row: {name: row[name][:9] for name in ("input_ids", "labels")})
        other_end = keyed_rows.map(lambda row: {name: row[name][-9:] for name in ("input_ids", "labels")})
        others = [keyed_rows.select([0]), shorter, other_end]
        paths = [scores_path(tmp_path, {"a": 1, "b": 2}, other) for other in others]
        paths.append(scores_path(tmp_path, {"a": 1, "b": 3}, keyed_rows))
        assert len({same, *paths}) == 5


class TestJoin:
    def test_by_key_in_any_order(self, keyed_rows):
        scores = pa.table(
            {EXAMPLE_KEY: keyed_rows[EXAMPLE_KEY][:], "length": [len(ids) for ids in keyed_rows["input_ids"]]}
        )
        joined = join_scores(keyed_rows.shuffle(seed=1).select(range(9)), scores, {"length": "l"}, "here")
        assert [len(ids) for ids in joined["input_ids"]] == list(joined["l"])

    def test_missing_example(self, keyed_rows):
        scores = pa.table({EXAMPLE_KEY: keyed_rows[EXAMPLE_KEY][:4], "length": [1] * 4})
        with pytest.raises(ValueError, match=r"Row 4 of the data set \(key \w+-0\) has no scores in here"):
            join_scores(keyed_rows, scores, {"length": "l"}, "here")


def commit_of(repository, digit):
    """The folder of a commit in the cache of the Hub, which is that of the branch `main` from now on."""
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(digit * 40)
    folder = repository / "snapshots" / (digit * 40)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class TestReferenceModels:
    def test_identity_changes_with_the_weights(self, tiny_model, tmp_path):
        before = identify_model(tiny_model)
        assert identify_model(copy.deepcopy(tiny_model)) == before
        tiny_model.model.layers[0].mlp.up_proj.weight.data += 1
        assert identify_model(tiny_model) != before

        tiny_model.save_pretrained(tmp_path)
        saved = identify_model(str(tmp_path))
        assert identify_model(str(tmp_path)) == saved
        in_bfloat16 = identify_model(str(tmp_path), {"dtype": torch.bfloat16})
        assert in_bfloat16 != saved and identify_model(str(tmp_path), {"dtype": "bfloat16"}) == in_bfloat16
        assert identify_model(str(tmp_path), {"token": "hf_secret"}) == saved  # which stands in the files of scores
        os.utime(tmp_path / "model.safetensors", ns=(1, 1))
        assert identify_model(str(tmp_path)) != saved

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

    def test_revision_is_that_of_the_adapter(self, tiny_model, tmp_path, monkeypatch):
        tiny_model.save_pretrained(tmp_path / "base")
        base = load_reference_model(str(tmp_path / "base"))
        get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
        asked, load = [], AutoModelForCausalLM.from_pretrained
        monkeypatch.setattr(
            AutoModelForCausalLM,
            "from_pretrained",
            lambda *args, **options: asked.append(options) or load(*args, **options),
        )
        load_reference_model(str(tmp_path / "adapter"), {"revision": "v1"})
        load_reference_model(str(tmp_path / "base"), {"revision": "v1"})
        assert [options.get("revision") for options in asked] == [None, "v1"]

    def test_identity_of_an_adapter_has_its_base(self, tiny_model, tmp_path):
        tiny_model.save_pretrained(tmp_path / "base")
        base = load_reference_model(str(tmp_path / "base"))
        get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
        before = identify_model(str(tmp_path / "adapter"))
        os.utime(tmp_path / "base" / "model.safetensors", ns=(1, 1))
        assert identify_model(str(tmp_path / "adapter")) != before

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

    def test_adapter_on_the_head_can_not_score(self, tiny_model):
        adapted = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["lm_head"]))
        with pytest.raises(ValueError, match="adapter on `lm_head` can't score"):
            LogProbScorer(adapted)

    def test_prompt_learning_can_not_score(self, tiny_model):
        adapted = get_peft_model(tiny_model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
        with pytest.raises(ValueError, match="prompt-learning adapter can't score"):
            LogProbScorer(adapted)

    def test_missing_weights(self, tiny_model, tmp_path):
        tiny_model.config.tie_word_embeddings = False
        LlamaForSequenceClassification(tiny_model.config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"lacks the weights \['lm_head.weight'\], which would be random"):
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
