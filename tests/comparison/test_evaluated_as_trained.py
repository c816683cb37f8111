"""`compare` loads the trained model with the recipe's options and evaluates it with the recipe's tags."""

from pathlib import Path

import pytest
import torch
import yaml
from helpers import commit_of, slow_nll
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hf_sft_variants.comparison import evaluations, run
from hf_sft_variants.comparison.files import read_json, write_json
from hf_sft_variants.comparison.study import EVALUATION_DEFAULTS
from hf_sft_variants.evaluation import held_out_nll
from hf_sft_variants.launch.loading import load_split


@pytest.fixture
def do_run(folder):
    """Trains a recipe with other keys in two steps, evaluates it, and returns the metrics."""

    def do(settings=None, **keys):
        recipe = yaml.safe_load(Path("sft.yaml").read_text()) | {"output_dir": "run", "dataset_name": "data"}
        recipe |= {"max_steps": 2, "use_peft": True, **keys}
        del recipe["num_processes"]
        description = {
            "recipe": recipe, "budget": {}, "arm": "arm", "data": "sums", "seed": 0,
            "evaluations": {**EVALUATION_DEFAULTS, "dataset_name": "data", "max_new_tokens": None, **(settings or {})},
        }  # fmt: skip
        Path("run").mkdir()
        write_json(Path("run/run.json"), description)
        run.do_run(Path("run"))
        return read_json(Path("run/evaluation.json"))["evaluations"]

    return do


def nll_of(base, rows, **options):
    """The trained adapter on a base model that is loaded here."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **options), "run").eval()
    return slow_nll(model, AutoTokenizer.from_pretrained("run"), rows)


@pytest.mark.parametrize("where", ["key", "model_init_kwargs"])
def test_revision(where, do_run, folder, tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    repository = folder / "hub" / "models--org--base"
    for commit in "ab":
        tiny_model.save_pretrained(commit_of(repository, commit))
        tokenizer.save_pretrained(commit_of(repository, commit))
        torch.nn.init.normal_(tiny_model.model.embed_tokens.weight, std=0.3)
    keys = {"key": {"model_revision": "a" * 40}, "model_init_kwargs": {"model_init_kwargs": {"revision": "a" * 40}}}
    result = do_run(model_name_or_path="org/base", **keys[where])
    rows = load_split("data")
    expected = nll_of(str(repository / "snapshots" / ("a" * 40)), rows, dtype=torch.float32)
    assert result["nll"]["mean"] == pytest.approx(expected, rel=1e-6)


def test_four_bits(do_run, folder):
    result = do_run(load_in_4bit=True, use_bnb_nested_quant=True)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    expected = nll_of("model", load_split("data"), quantization_config=config, dtype=torch.float32)
    assert result["nll"]["mean"] == pytest.approx(expected, rel=1e-6)


def test_dtype(do_run, folder, tiny_model):
    """Saved in bfloat16, and trained in float32, which is TRL's default."""
    tiny_model.bfloat16().save_pretrained("model")
    result = do_run()
    expected = nll_of("model", load_split("data"), dtype=torch.float32)
    assert result["nll"]["mean"] == pytest.approx(expected, rel=1e-6)


def test_code_and_attention(do_run, monkeypatch):
    asked, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **options: asked.append(options) or load(*args, **options),
    )
    do_run(attn_implementation="eager", trust_remote_code=True)
    assert (asked[-1]["attn_implementation"], asked[-1]["trust_remote_code"]) == ("eager", True)


def test_another_chat_template(do_run, folder, tiny_model, tokenizer):
    """TRL adds the template's tokens to the embeddings, and PEFT saves these with the adapter."""
    tiny_model.config.tie_word_embeddings = False
    tiny_model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(tiny_model.lm_head.weight))
    tiny_model.save_pretrained("model")
    template = AutoTokenizer.from_pretrained("model")
    template.add_tokens(["<think>", "</think>"], special_tokens=True)
    template.save_pretrained("template")
    result = do_run(chat_template_path="template")
    base = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("run")
    base.resize_token_embeddings(len(tokenizer))
    expected = slow_nll(PeftModel.from_pretrained(base, "run").eval(), tokenizer, load_split("data"))
    assert result["nll"]["mean"] == pytest.approx(expected, rel=1e-6)


def test_tags(do_run, folder, monkeypatch):
    """The arm's own tags count in the likelihood and in reading its answers."""
    for split in ("train", "test"):
        rows = load_split("data", split)
        rows = rows.add_column("reasoning", ["Add."] * len(rows)).remove_columns("completion")
        rows.to_json(f"tagged/{split}.jsonl")
    answers = load_split("tagged")["answer"]
    texts = [f"[t]Add.[/t]\n[a]{answer}[/a]" for answer in answers]
    monkeypatch.setattr(evaluations, "generate_answers", lambda *args: texts)
    tags = {"thinking_tags": ["[t]", "[/t]"], "answer_tags": ["[a]", "[/a]"]}
    settings = {"dataset_name": "tagged", "tagged": True, "max_new_tokens": 4}
    columns = {"reasoning_column": "reasoning", "answer_column": "answer"}
    result = do_run(
        settings, module="hf_sft_variants.sftkey", dataset_name="tagged", max_length=128, **tags, **columns
    )
    base = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    model, tokenizer = PeftModel.from_pretrained(base, "run").eval(), AutoTokenizer.from_pretrained("run")
    expected = held_out_nll(model, tokenizer, load_split("tagged"), tagged=True, **tags)
    assert result["nll"]["mean"] == pytest.approx(expected, rel=1e-6)
    assert result["accuracy"]["mean"] == result["format"]["mean"] == 1


def test_recipe_is_read_as_it_was_written(do_run, folder):
    """A full fine-tuning is evaluated with the same options, of which a folder has no revision."""
    result = do_run(use_peft=False, model_revision="main", dtype="bfloat16")
    assert yaml.safe_load(Path("run/recipe.yaml").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained("run")
    assert model.dtype == torch.bfloat16
    expected = slow_nll(model, AutoTokenizer.from_pretrained("run"), load_split("data"))
    assert result["nll"]["mean"] == pytest.approx(expected, rel=1e-3)
