"""`hf-sft-variants evaluate` measures the model that was saved: against dense logits, one row at a time."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import commit_of, slow_nll
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed
from trl import SFTConfig, SFTTrainer

from hf_sft_variants.cli import main
from hf_sft_variants.evaluation import generate_answers
from hf_sft_variants.evaluation.tagged_answers import tagged_response


@pytest.fixture
def rows(chat_rows):
    """Prompts and completions of different lengths, so that batches are padded."""
    answers = [row["completion"][0]["content"].split()[-1] for row in chat_rows]
    return chat_rows.add_column("answer", answers).map(
        lambda row, i: {
            "prompt": [{"role": "user", "content": "Please. " * (i % 4) + row["prompt"][0]["content"]}],
            "completion": [{"role": "assistant", "content": row["completion"][0]["content"] * (1 + i % 3)}],
        },
        with_indices=True,
    )


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_model, tokenizer, rows):
    monkeypatch.chdir(tmp_path)
    tiny_model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    rows.to_json("data/test.jsonl")
    return tmp_path


@pytest.fixture
def evaluate(folder):
    """The figures of `hf-sft-variants evaluate`."""

    def run(*arguments):
        options = ["--dataset", "data", "--max-new-tokens", "2", "--batch-size", "5", "--device", "cpu"]
        assert main(["evaluate", *arguments, *options, "--json", "figures.json"]) == 0
        return json.loads((folder / "figures.json").read_text())

    return run


def load_base(**options):
    return AutoModelForCausalLM.from_pretrained("base", **options)


def resized(model, tokenizer, size):
    """Resize as TRL does when `chat_template_path` adds tokens: dummy tokens fill the tokenizer up to the new size."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(size - len(tokenizer))])
    model.resize_token_embeddings(size)
    tokenizer.save_pretrained("adapter")
    return model


LORA = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "lora_on_the_head": LoraConfig(**{**LORA, "target_modules": ["q_proj", "lm_head"]}),
    "lora_on_the_embeddings": LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens"]}),
    "saved_head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "trained_tokens": LoraConfig(**LORA, trainable_token_indices=[5, 17]),
    "prompt_tuning": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p_tuning": PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    "prefix_tuning": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def test_plain_model(evaluate, tokenizer, rows):
    assert evaluate("base")["held_out_nll"] == pytest.approx(slow_nll(load_base(), tokenizer, rows), rel=1e-6)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter(kind, evaluate, tokenizer, rows):
    set_seed(1)
    adapted = get_peft_model(load_base(), ADAPTERS[kind]).eval()
    adapted.save_pretrained("adapter")
    expected = slow_nll(adapted, tokenizer, rows)
    assert expected != pytest.approx(slow_nll(load_base(), tokenizer, rows), rel=1e-4)
    assert evaluate("adapter")["held_out_nll"] == pytest.approx(expected, rel=1e-6)
    assert evaluate("base", "--adapter", "adapter")["held_out_nll"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("base_size", [330, 400], ids=["larger", "smaller"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["", "modules_to_save"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_adapter_of_resized_embeddings(tied, options, base_size, evaluate, tokenizer, rows):
    """TRL also shrinks the embeddings of a model that has more of them than tokens."""
    model = load_base()
    model.resize_token_embeddings(base_size)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(model.lm_head.weight))
    model.save_pretrained("base")
    adapted = get_peft_model(resized(load_base(), tokenizer, 384), LoraConfig(**LORA, **options)).eval()
    adapted.save_pretrained("adapter")
    expected = slow_nll(adapted, tokenizer, rows)
    assert evaluate("adapter")["held_out_nll"] == pytest.approx(expected, rel=1e-6)


def test_adapter_trained_with_another_chat_template(folder, evaluate, tiny_model, tokenizer, rows):
    """TRL adds the template's tokens, and trains them and the LM head."""
    tiny_model.config.tie_word_embeddings = False
    tiny_model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(tiny_model.lm_head.weight))
    tiny_model.save_pretrained("base")
    template = copy.deepcopy(tokenizer)
    template.add_tokens(["<think>", "</think>"], special_tokens=True)
    template.save_pretrained("template")
    args = SFTConfig(
        "adapter", use_cpu=True, bf16=False, report_to="none", max_steps=1, learning_rate=0.1, save_strategy="no",
        chat_template_path="template",
    )  # fmt: skip
    trainer = SFTTrainer("base", args, train_dataset=rows, peft_config=LoraConfig(**LORA))
    trainer.train()
    trainer.save_model()
    assert trainer.model.get_input_embeddings().weight.shape[0] > len(tokenizer) + 2
    expected = slow_nll(trainer.model.eval(), trainer.processing_class, rows)
    assert evaluate("adapter")["held_out_nll"] == pytest.approx(expected, rel=1e-6)


def test_adapter_on_four_bits(evaluate, tokenizer, rows):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    adapted = get_peft_model(load_base(quantization_config=config), LoraConfig(**LORA)).eval()
    adapted.save_pretrained("adapter")
    expected = slow_nll(adapted, tokenizer, rows)
    assert evaluate("adapter")["held_out_nll"] != pytest.approx(expected, rel=1e-3)
    figures = evaluate("adapter", "--load_in_4bit", "--use-bnb-nested-quant")
    assert figures["held_out_nll"] == pytest.approx(expected, rel=1e-6)


def test_dtype(evaluate, tokenizer, rows):
    """By default the dtype that the model was saved with."""
    load_base().bfloat16().save_pretrained("base")
    for options, dtype in (([], torch.bfloat16), (["--dtype", "float32"], torch.float32)):
        expected = slow_nll(load_base(dtype=dtype), tokenizer, rows)
        assert evaluate("base", *options)["held_out_nll"] == pytest.approx(expected, rel=1e-3 if not options else 1e-6)


def test_attention_implementation(folder, evaluate, monkeypatch):
    asked, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **options: asked.append(options) or load(*args, **options),
    )
    evaluate("base", "--attn_implementation", "eager", "--trust_remote_code")
    assert (asked[0]["attn_implementation"], asked[0]["trust_remote_code"]) == ("eager", True)


@pytest.fixture
def revisions(folder, monkeypatch, tiny_model, tokenizer):
    """`org/base` in the cache of the Hub: the commit b…, which is `main`, and a…, with other weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    repository = folder / "hub" / "models--org--base"
    for commit in "ab":
        tiny_model.save_pretrained(commit_of(repository, commit))
        tokenizer.save_pretrained(commit_of(repository, commit))
        torch.nn.init.normal_(tiny_model.model.embed_tokens.weight, std=0.3)
    return [str(repository / "snapshots" / (commit * 40)) for commit in "ab"]


def test_revision(revisions, evaluate, tokenizer, rows):
    old, new = (slow_nll(AutoModelForCausalLM.from_pretrained(folder), tokenizer, rows) for folder in revisions)
    assert evaluate("org/base")["held_out_nll"] == pytest.approx(new, rel=1e-6) != pytest.approx(old, rel=1e-3)
    assert evaluate("org/base", "--model_revision", "a" * 40)["held_out_nll"] == pytest.approx(old, rel=1e-6)


def test_revision_of_an_adapters_base_model(folder, revisions, evaluate, tokenizer, rows):
    """The revision that the adapter was saved with, if it records one, or the given one."""
    old = AutoModelForCausalLM.from_pretrained("org/base", revision="a" * 40)
    adapted = get_peft_model(old, LoraConfig(**LORA), revision="a" * 40).eval()
    adapted.save_pretrained("adapter")
    expected = slow_nll(adapted, tokenizer, rows)
    assert evaluate("adapter")["held_out_nll"] == pytest.approx(expected, rel=1e-6)
    adapted.peft_config["default"].revision = None
    adapted.save_pretrained("adapter")
    assert evaluate("adapter")["held_out_nll"] != pytest.approx(expected, rel=1e-3)
    for model in (["adapter"], ["org/base", "--adapter", "adapter"]):
        assert evaluate(*model, "--model_revision", "a" * 40)["held_out_nll"] == pytest.approx(expected, rel=1e-6)
    # An adapter on the Hub has its own revisions
    shutil.copytree("adapter", commit_of(folder / "hub" / "models--org--adapter", "c"), dirs_exist_ok=True)
    figures = evaluate("org/adapter", "--model_revision", "c" * 40)
    assert figures["held_out_nll"] == evaluate("adapter")["held_out_nll"]


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_virtual_tokens_stand_before_every_prompt_of_a_batch(kind, tiny_model, tokenizer, rows):
    set_seed(1)
    adapted = get_peft_model(tiny_model, ADAPTERS[kind])
    # A single prompt has no padding
    batched, single = (generate_answers(adapted, tokenizer, rows["prompt"], 6, size) for size in (12, 1))
    assert batched == single != generate_answers(tiny_model, tokenizer, rows["prompt"], 6)


def break_weights(folder):
    (folder / "base" / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00no tensors here")
    return ["base"], r"`model` 'base' can't be loaded: .*header.*\. Pass the folder of a causal language model"


def break_adapter_config(folder):
    (folder / "adapter" / "adapter_config.json").write_text("{broken")
    return ["adapter"], r"`model` 'adapter' can't be loaded: Expecting property name .*\. Pass the folder"


def break_base_name(folder):
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    return ["adapter"], "`model` 'adapter' can't be loaded: its adapter_config.json does not name a base model"


def break_adapter_type(folder):
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "NEW"}))
    return ["base", "--adapter", "adapter"], "`adapter` 'adapter' can't be loaded: 'NEW'"


def remove_adapter_weights(folder):
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    return ["adapter"], "`model` 'adapter' can't be loaded: it has no adapter_model.safetensors"


def leave_out_adapter_weights(folder):
    path = folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: weights[name] for name in sorted(weights)[1:]}, path)
    return ["adapter"], r"`model` 'adapter' can't be loaded: Found missing adapter keys .*layers.0.mlp.up_proj.lora_A"


def leave_out_weights(folder):
    path = folder / "base" / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    return [
        "base"
    ], r"`model` 'base' can't be loaded: it lacks the weights \['model.norm.weight'\], which would be random"


def leave_out_a_later_completion(folder):
    rows = Path("data/test.jsonl").read_text().splitlines()
    rows[3] = json.dumps({**json.loads(rows[3]), "completion": None})
    Path("data/test.jsonl").write_text("\n".join(rows))
    return ["base"], "Column 'completion' of `dataset` holds None in row 3: pass conversations"


ARGUMENTS = [
    (["--adapter", "base"], "`adapter` 'base' can't be loaded: it has no adapter_config.json"),
    (["--device", "cuda:99"], r"`device` is 'cuda:99', which can't be used here \(.+\): pass e.g. cpu"),
    (["--device", "meta"], r"`device` is 'meta', which can't be used here \(.+\): pass e.g. cpu"),
    *(
        (["--json", path], f"`--json` is '{path}', which can't be written: name a file in an existing folder")
        for path in ("nowhere/figures.json", "data", "base/config.json/figures.json")
    ),
    (["--load_in_4bit", "--load_in_8bit"], "`--load_in_4bit` and `--load_in_8bit` exclude each other"),
    (
        ["--load_in_4bit", "--dtype", "auto"],
        "`dtype` must be float32, bfloat16 or float16 with `load_in_4bit`, got 'auto'",
    ),
    (
        ["--load_in_4bit", "--bnb_4bit_quant_storage", "zip"],
        "The quantization keys can't be used: `bnb_4bit_quant_storage` must be",
    ),
    (["--answer-tags", "[a]", "[/a]"], "`--thinking-tags` and `--answer-tags` need `--tagged`"),
    (["--tagged", "--answer-tags", "[a]", "[a]"], r".*`answer_tags` \['\[a\]', '\[a\]'\], where '\[a\]' is in"),
]
QUESTION, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "5"}
ROWS = [
    (
        {"prompt": [QUESTION], "completion": []},
        "`dataset` has only empty completions: pass at least one that has tokens",
    ),
    ({"prompt": [], "completion": [ANSWER]}, r"Column 'prompt' of `dataset` holds \[\] in row 0: pass conversations"),
    ({"prompt": ["Hi"], "completion": ["5"]}, r"Column 'prompt' of `dataset` holds \['Hi'\] in row 0: pass conv"),
    ('{"prompt": [', "`dataset` 'data' with `split` 'test' could not be loaded"),
]


@pytest.fixture
def error_of_evaluate(folder, capsys, monkeypatch):
    """The message of an error that comes before anything is generated."""
    monkeypatch.setattr("hf_sft_variants.evaluation.generation._generate", None)

    def run(arguments):
        assert main(["evaluate", "--dataset", "data", "--device", "cpu", *arguments]) == 2
        return capsys.readouterr().err.partition("hf-sft-variants: error: ")[2]

    return run


@pytest.mark.parametrize(
    "spoil",
    [
        break_weights, break_adapter_config, break_base_name, break_adapter_type, remove_adapter_weights,
        leave_out_adapter_weights, leave_out_weights, leave_out_a_later_completion,
    ],
)  # fmt: skip
def test_unusable_files_are_named(spoil, folder, error_of_evaluate):
    get_peft_model(load_base(), ADAPTERS["lora"]).save_pretrained("adapter")
    arguments, message = spoil(folder)
    assert re.match(message, error_of_evaluate(arguments))


@pytest.mark.parametrize("arguments, message", ARGUMENTS)
def test_unusable_arguments_are_named(arguments, message, error_of_evaluate):
    if "--tagged" in arguments:
        Path("data/test.jsonl").write_text('{"prompt": [{}], "reasoning": "a", "answer": "5"}\n')
    assert re.match(message, error_of_evaluate(["base", *arguments]))


@pytest.mark.parametrize("row, message", ROWS)
def test_unusable_rows_are_named(row, message, error_of_evaluate):
    text = row if isinstance(row, str) else json.dumps({**row, "answer": "5"})
    Path("data/test.jsonl").write_text(text + "\n")
    assert re.match(message, error_of_evaluate(["base"]))


def test_an_exception_without_a_message_has_its_name(folder, capsys, monkeypatch):
    def load(*args, **options):
        raise OSError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    assert main(["evaluate", "base", "--dataset", "data", "--device", "cpu"]) == 2
    assert "`model` 'base' can't be loaded: OSError. Pass" in capsys.readouterr().err


def test_own_tags(folder, tokenizer, tiny_model, rows, capsys, monkeypatch):
    """Likelihood, accuracy and format refer to responses with the given tags."""
    tags = {"thinking_tags": ["[t]", "[/t]"], "answer_tags": ["[a]", "[/a]"]}
    tagged = rows.add_column("reasoning", ["Add."] * len(rows)).remove_columns("completion")
    tagged.to_json("tagged/test.jsonl")
    responses = [tagged_response("Add.", answer, **tags) for answer in rows["answer"]]
    ready = rows.remove_columns("completion").add_column(
        "completion", [[{"role": "assistant", "content": response}] for response in responses]
    )
    monkeypatch.setattr("hf_sft_variants.evaluation.generate_answers", lambda *args: responses)
    command = ["evaluate", "base", "--tagged", "--dataset", "tagged", "--device", "cpu", "--json", "figures.json"]
    options = [["--thinking-tags", *tags["thinking_tags"]], ["--answer-tags", *tags["answer_tags"]]]
    assert main([*command, *options[0], *options[1]]) == 0
    figures = json.loads(Path("figures.json").read_text())
    assert figures["held_out_nll"] == pytest.approx(slow_nll(tiny_model.eval(), tokenizer, ready), rel=1e-6)
    assert figures["accuracy"] == figures["format_rate"] == 1
    assert main(command) == 0
    assert json.loads(Path("figures.json").read_text())["held_out_nll"] != figures["held_out_nll"]
