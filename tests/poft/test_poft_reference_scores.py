import copy
import itertools
import json
import logging
import shutil
import weakref

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_from_disk
from fixtures.chat_templates import TOOLS
from helpers import make_trainer, padded_document_log_probs
from peft import LoraConfig, get_peft_model
from poft_references import FAMILIES, save_reference, slow_score
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_sft_variants import PoFTConfig, PoFTTrainer, ReferenceScoringCallback
from hf_sft_variants.poft import reference_scoring
from hf_sft_variants.poft.reference_rendering import merge_system_turn, render_for_reference
from hf_sft_variants.text.token_offsets import TokenOffsets


CLASSES = (PoFTTrainer, PoFTConfig)
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "What is 12 plus 30?"}, {"role": "assistant", "content": "It is 42."}],
    "several turns": [
        SYSTEM,
        {"role": "user", "content": "A naïve café?"},
        {"role": "assistant", "content": "Yes, really.\n\nThe sum is 42."},
        {"role": "user", "content": "日本語 😀"},
        {"role": "assistant", "content": "日本語の文章 👍🏽, e\u0301te\u0301!"},
    ],
    "outer white space": [
        {"role": "user", "content": " Work, please. "},
        {"role": "assistant", "content": "  42, then the ones:  \n"},
        {"role": "user", "content": "42"},
        {"role": "assistant", "content": "the tens "},
    ],
    "the words of others": [
        {"role": "user", "content": "42"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": "user"},
    ],
}
TOOL_TURNS = [
    SYSTEM,
    {"role": "user", "content": "12 plus 30?"},
    {"role": "assistant", "content": "Add the tens"},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "the sum is 42"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of each family of templates."""
    folder = tmp_path_factory.mktemp("references")
    return {family: save_reference(family, folder / family, seed) for seed, family in enumerate(FAMILIES)}


@pytest.fixture(scope="module")
def conversations():
    return Dataset.from_dict({"messages": list(CONVERSATIONS.values())})


@pytest.fixture
def make(tiny_model, tokenizer, tmp_path):
    """Makes a trainer whose scores are kept in the test's own folder."""

    def make(rows, models=None, **options):
        options = {"score_cache_dir": str(tmp_path / "scores"), "max_length": None, **options}
        return make_trainer(*CLASSES, tiny_model, tokenizer, rows, tmp_path, reference_models=models, **options)

    return make


def scored_values(trainer):
    return trainer.train_dataset["reference_log_probs"]


class TestScores:
    @pytest.mark.parametrize("end_of_turn", [True, False])
    def test_equal_hand_rendered_slow_ones(self, end_of_turn, folders, conversations, make):
        trainer = make(conversations, list(folders.values()), score_end_of_turn=end_of_turn)
        for messages, row in zip(conversations["messages"], trainer.train_dataset, strict=True):
            for j, (family, folder) in enumerate(folders.items()):
                pieces = FAMILIES[family][3](messages, AutoTokenizer.from_pretrained(folder))
                total, number = slow_score(folder, pieces, end_of_turn)
                assert row[f"reference_log_prob_{j}"] == pytest.approx(
                    [total / number] * len(row["input_ids"]), abs=1e-4
                )

    def test_of_tool_turns_and_tools(self, folders, make):
        families = ["chatml", "llama_3", "zephyr"]
        rows = Dataset.from_dict({"messages": [TOOL_TURNS], "tools": ['[{"name": "add"}]']})
        trainer = make(rows, [folders[family] for family in families])
        for family, value in zip(families, scored_values(trainer)[0], strict=True):
            pieces = FAMILIES[family][3](TOOL_TURNS, AutoTokenizer.from_pretrained(folders[family]))
            total, number = slow_score(folders[family], pieces)
            assert value == pytest.approx(total / number, abs=1e-4)

    def test_of_prompts_and_completions(self, folders, make):
        """Of a conversation the completion's turns; of text the completion, each model with its own end."""
        messages = CONVERSATIONS["several turns"]
        rows = Dataset.from_dict({"prompt": [messages[:4]], "completion": [messages[4:]]})
        family, folder = "llama_3", folders["llama_3"]
        pieces = list(FAMILIES[family][3](messages, AutoTokenizer.from_pretrained(folder)))
        last = [piece[1] for piece in pieces].index("words", 10)
        pieces = [(text, scored if number >= last else None) for number, (text, scored) in enumerate(pieces)]
        total, number = slow_score(folder, pieces)
        assert scored_values(make(rows, [folder]))[0] == [pytest.approx(total / number, abs=1e-4)]

        rows = Dataset.from_dict({"prompt": ["What is 12 plus"], "completion": [" 30?"]})
        for family in ("llama_3", "zephyr"):
            folder, tokenizer = folders[family], AutoTokenizer.from_pretrained(folders[family])
            bos = "<s>" if family == "zephyr" else ""  # the only tokenizer that puts one before a text
            total, number = slow_score(
                folder, [(bos, None), ("What is 12 plus", None), (" 30?", "words"), (tokenizer.eos_token, "end")]
            )
            assert scored_values(make(rows, [folder]))[0] == [pytest.approx(total / number, abs=1e-4)], family

    def test_over_the_targets_number_of_tokens(self, folders, conversations, make):
        own, target = (
            make(conversations, [folders["llama_3"]], length_normalizer=normalizer) for normalizer in ("own", "target")
        )
        sums = own.reference_scoring.scores["train"]
        for mean, value, total, row in zip(
            scored_values(own), scored_values(target), sums["sum_log_prob"].to_pylist(), own.train_dataset, strict=True
        ):
            assert value == [pytest.approx(total / sum(row["scored_mask"]))] != mean

    def test_of_tokens(self, tiny_model, tokenizer, token_rows, make, tmp_path):
        folder = save_changed(tiny_model, tokenizer, tmp_path / "reference")
        trainer = make(token_rows, [folder])
        model = AutoModelForCausalLM.from_pretrained(folder)
        for row in trainer.train_dataset:
            found = padded_document_log_probs(model, row["input_ids"], row["labels"])
            found = [log_prob for log_prob in found if log_prob is not None]
            assert row["reference_log_prob_0"][-1] == pytest.approx(sum(found) / len(found), abs=1e-4)

    def test_of_four_bits_and_adapters(self, tokenizer, conversations, make, tmp_path):
        """Both from a recipe's values; the adapter has its base model's tokenizer, and other scores."""
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=1,
            num_attention_heads=4, initializer_range=0.1,
        )  # fmt: skip
        folder = save_changed(LlamaForCausalLM(config), tokenizer, tmp_path / "base")
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder),
            LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
        )
        adapted.save_pretrained(tmp_path / "adapter")
        (base, adapter), *_ = scored_values(make(conversations, [folder, str(tmp_path / "adapter")]))
        assert base != adapter
        four_bits = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}}
        (quantized,), *_ = scored_values(make(conversations, [folder], reference_model_init_kwargs=four_bits))
        assert quantized == pytest.approx(base, rel=0.2) and quantized != base


def save_changed(model, tokenizer, folder):
    """A model with other weights and the same tokenizer."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    other.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class TestSameTextOnBothSides:
    @pytest.mark.parametrize(
        ("family", "name"),
        [
            *itertools.product(["chatml", "llama_3", "no_system"], CONVERSATIONS),
            *itertools.product(["chatml", "llama_3"], ["tool turns"]),
        ],
    )
    def test_is_the_content_of_the_messages(self, family, name, folders, make):
        """Up to white space that a template trims; read back from the tokens alone."""
        messages = {**CONVERSATIONS, "tool turns": TOOL_TURNS}[name]
        tokenizer = AutoTokenizer.from_pretrained(folders[family])
        row = {"messages": messages, "example_row": 0}
        rendered = render_for_reference(row, tokenizer, "", False, family, "train")
        turns, read = runs(rendered["labels"]), TokenOffsets(tokenizer)
        contents = [message["content"] for message in messages if message["role"] == "assistant"]
        assert [read(turn)[0].strip() for turn in turns] == [content.strip() for content in contents]
        if family == "chatml":
            assert [read(turn)[0] for turn in turns] == contents

    def test_tool_calls_are_no_words(self, folders):
        """A template may write calls behind the words: neither they nor what ends their turn is scored."""
        tokenizer = AutoTokenizer.from_pretrained(folders["chatml"])
        tokenizer.chat_template = TOOLS
        call = {"type": "function", "function": {"name": "add", "arguments": {}}}
        messages = [{"role": "user", "content": "12 plus 30?"}, {"role": "assistant", "content": "Let me see"}]
        row = {"messages": [messages[0], {**messages[1], "tool_calls": [call]}], "example_row": 0}
        rendered = render_for_reference(row, tokenizer, "", True, "m", "train")
        assert "add" in tokenizer.decode(rendered["input_ids"])
        assert [TokenOffsets(tokenizer)(turn)[0].strip() for turn in runs(rendered["labels"])] == ["Let me see"]

    def test_there_is_no_second_beginning(self, folders):
        tokenizer = AutoTokenizer.from_pretrained(folders["llama_3"])
        row = {"messages": CONVERSATIONS["one turn"], "example_row": 0}
        rendered = render_for_reference(row, tokenizer, "", True, "m", "train")
        assert rendered["input_ids"].count(tokenizer.bos_token_id) == 1

    def test_a_template_that_changes_the_words_is_an_error(self, folders, make, tmp_path):
        folder = tmp_path / "shouting"
        shutil.copytree(folders["chatml"], folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = tokenizer.chat_template.replace("['content']", "['content'] | upper")
        tokenizer.save_pretrained(folder)
        rows = Dataset.from_dict({"messages": [CONVERSATIONS["one turn"]]})
        with pytest.raises(
            ValueError, match=r"Row 0 of the train .* the scored tokens say 'IT IS 42.', but the assis"
        ):
            make(rows, [str(folder)])

    def test_system_turns_are_merged_or_refused(self, folders, make):
        merged = merge_system_turn({"messages": CONVERSATIONS["several turns"]})["messages"]
        assert merged[0] == {"role": "user", "content": "Be brief.\n\nA naïve café?"} and len(merged) == 4
        rows = Dataset.from_dict({"messages": [CONVERSATIONS["one turn"], TOOL_TURNS]})
        with pytest.raises(
            ValueError, match=r"Row 1 of the train dataset can't be scored by .*: No tool role. Change"
        ):
            make(rows, [folders["no_system"]])


def runs(labels):
    """The labels of each turn."""
    turns = [[]]
    for label in labels:
        if label != -100:
            turns[-1].append(label)
        elif turns[-1]:
            turns.append([])
    return [turn for turn in turns if turn]


class TestCache:
    def test_scores_are_found_by_content(self, folders, conversations, make, monkeypatch, tmp_path):
        models = [folders["chatml"], folders["zephyr"]]
        first = make(conversations, models)
        assert len(list((tmp_path / "scores").iterdir())) == 2
        monkeypatch.setattr(reference_scoring, "load_reference_model", None)  # must not be called again
        again = make(conversations.select([2, 0, 3, 1]), models, beta=2.0)
        assert [scored_values(again)[row] for row in (1, 3, 0, 2)] == list(scored_values(first))

    def test_other_settings_score_again(self, folders, conversations, make, tmp_path):
        for options in ({}, {"score_end_of_turn": False}):
            make(conversations, [folders["chatml"]], **options)
        assert len(list((tmp_path / "scores").iterdir())) == 2

    def test_max_length_scores_nothing_again(self, folders, conversations, make, monkeypatch):
        """A reference reads whole examples, or none of them."""
        values = scored_values(make(conversations, [folders["chatml"]]))
        monkeypatch.setattr(reference_scoring, "load_reference_model", None)  # must not be called again
        assert scored_values(make(conversations, [folders["chatml"]], max_length=500)) == values
        assert 0 < len(make(conversations, [folders["chatml"]], max_length=60).train_dataset) < len(conversations)

    def test_files_say_what_they_were_made_with(self, folders, conversations, make, tmp_path):
        make(conversations, [folders["chatml"]])
        (path,) = (tmp_path / "scores").glob("*/*.parquet")
        table = pq.read_table(path)
        assert table.column_names == ["example_key", "sum_log_prob", "num_tokens"]
        described = json.loads(table.schema.metadata[b"hf_sft_variants"])
        assert {"version", "options", "chat_template", "score_end_of_turn"} <= described.keys()

    def test_second_start_prepares_nothing_again(self, folders, conversations, make, tmp_path):
        conversations.save_to_disk(tmp_path / "data")
        fingerprints = {
            make(load_from_disk(tmp_path / "data"), [folders["chatml"]]).train_dataset._fingerprint for _ in range(2)
        }
        assert len(fingerprints) == 1

    def test_equal_rows_and_packing(self, folders, conversations, make):
        rows = conversations.select([1, 0, 1, 1])
        values = scored_values(make(rows, [folders["llama_3"]]))
        assert values[0] == values[2] == values[3] != values[1]
        packed = make(rows, [folders["llama_3"]], packing=True, max_length=512).train_dataset
        assert sorted({value for row in packed["reference_log_prob_0"] for value in row}) == sorted(
            torch.tensor(values[:2]).flatten().tolist()
        )


class TestTooLong:
    def test_examples_are_dropped_and_counted(self, conversations, make, tmp_path, caplog):
        short = save_reference("chatml", tmp_path / "short", max_positions=40)
        trainer = make(conversations, [short])
        assert "examples of the train dataset can't be scored" in caplog.text and f"by {short}" in caplog.text
        lengths = trainer.reference_scoring.scores["train"]["num_tokens"].to_pylist()
        assert lengths.count(None) == 4 - len(trainer.train_dataset) > 0

    def test_max_length_holds_in_every_model(self, folders, conversations, make):
        target = [len(row["input_ids"]) for row in make(conversations, [folders["chatml"]]).train_dataset]
        limit = sorted(target)[2]  # one is too long for the target, and the reference's tokens are more
        trainer = make(conversations, [folders["llama_3"]], max_length=limit)
        assert len(trainer.train_dataset) < sum(length <= limit for length in target)

    def test_nothing_left(self, conversations, make, tmp_path):
        short = save_reference("chatml", tmp_path / "short", max_positions=4)
        with pytest.raises(ValueError, match="with .*short: no example .* supervised token and at most 4 tokens. C"):
            make(conversations, [short])


class TestCallback:
    def test_training_alone_does_everything(self, folders, conversations, tiny_model, tokenizer, tmp_path, caplog):
        callback = ReferenceScoringCallback(
            [folders["zephyr"], folders["llama_3"]], score_cache_dir=str(tmp_path / "scores"), batch_tokens=200
        )
        trainer = make_trainer(
            *CLASSES, tiny_model, tokenizer, conversations, tmp_path, callbacks=[callback], max_steps=1,
            max_length=None, eval_dataset=conversations.select([0]),
        )  # fmt: skip
        with caplog.at_level(logging.INFO, logger="hf_sft_variants.poft.reference_scoring"):
            trainer.train()
        log = trainer.state.log_history[0]
        assert {"poft/reference_zephyr", "poft/reference_llama_3", "poft/reference_mean"} <= log.keys()
        lines = [line for line in caplog.text.splitlines() if "nats per token on average over" in line]
        assert len(lines) == 4
        assert "poft/margin" in {name.removeprefix("eval_") for name in trainer.evaluate()}

    def test_each_model_is_gone_before_the_next_comes(self, folders, conversations, make, monkeypatch):
        loaded, load = [], reference_scoring.load_reference_model

        def load_alone(*args):
            assert all(model() is None for model in loaded)
            model = load(*args)
            loaded.append(weakref.ref(model))
            return model

        monkeypatch.setattr(reference_scoring, "load_reference_model", load_alone)
        make(conversations, [folders["chatml"], folders["llama_3"], folders["zephyr"]])
        assert len(loaded) == 3

    def test_own_model_among_the_references(self, tiny_model, tokenizer, conversations, make, tmp_path, caplog):
        tiny_model.save_pretrained(tmp_path / "own")
        tokenizer.save_pretrained(tmp_path / "own")
        tiny_model.config._name_or_path = str(tmp_path / "own")
        trainer = make(conversations, [str(tmp_path / "own")], max_steps=1, per_device_train_batch_size=4)
        trainer.train()
        assert "is also the model to train, so training starts with no margin" in caplog.text
        log = trainer.state.log_history[0]
        assert log["poft/tau_min"] == pytest.approx(0.5, abs=1e-5) == log["poft/tau_max"]
        assert log["poft/margin"] == pytest.approx(0, abs=1e-5)

    def test_two_sources_of_models(self, tiny_model, tokenizer, conversations, tmp_path):
        callback = ReferenceScoringCallback(["a"])
        for name in ("reference_models", "reference_score_file"):
            options = {"callbacks": [callback], name: ["b"]}
            with pytest.raises(ValueError, match=rf"`{name}=\['b'\]` and a `ReferenceScoringCallback` .* both bring"):
                make_trainer(*CLASSES, tiny_model, tokenizer, conversations, tmp_path, **options)

    @pytest.mark.parametrize("models", [[], ["a", "a"]])
    def test_needs_models(self, models):
        with pytest.raises(ValueError, match="pass at least one, and each only once"):
            ReferenceScoringCallback(models)


class TestBadReferences:
    def test_no_second_model(self, folders, conversations, make, tmp_path):
        """Found before the first one scores."""
        with pytest.raises(ValueError, match="nowhere' can't be loaded"):
            make(conversations, [str(folders["chatml"]), str(tmp_path / "nowhere")])
        assert not (tmp_path / "scores").exists()

    def test_no_chat_template(self, folders, conversations, make, tmp_path):
        shutil.copytree(folders["chatml"], tmp_path / "base")
        (tmp_path / "base" / "chat_template.jinja").unlink()
        with pytest.raises(
            ValueError, match="Row 0 .* can't be scored by the reference .*base': its tokenizer has no chat"
        ):
            make(conversations, [str(tmp_path / "base")])

    def test_tokens_need_the_same_vocabulary(self, folders, token_rows, make):
        with pytest.raises(
            ValueError, match="has another vocabulary than the trained model: .* Tokens, unlike messages"
        ):
            make(token_rows, [folders["chatml"]])
