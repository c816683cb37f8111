"""`hf-sft-variants score` and training prepare the same examples, so training finds every score."""

from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from fixtures.small_tokenizers import word_piece
from helpers import SMALL
from transformers import BertConfig, BertForTokenClassification, set_seed

from hf_sft_variants import SFTGOConfig, SFTGOTrainer
from hf_sft_variants.cli import main
from hf_sft_variants.launch import training


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_model, tokenizer):
    """A working directory with models and data; long prompts leave some rows without a label after truncation."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "reference"):
        tiny_model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        tiny_model.model.embed_tokens.weight.data.mul_(1.1)
    set_seed(0)
    words = word_piece()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=64, **shape)
    BertForTokenClassification(config).save_pretrained("importance")
    words.save_pretrained("importance")
    Path("data").mkdir()
    for split, numbers in (("train", range(12)), ("test", range(20, 26))):
        rows = [
            {"prompt": " many words" * (number % 4 * 5) + f" {number}?", "completion": f" The sum is {number}." * 3}
            for number in numbers
        ]
        Dataset.from_list(rows).to_json(f"data/{split}.jsonl")
    return tmp_path


METHODS = {
    "rho1": ({"group_by": "rho1", "reference_model": "reference"}, "reference_log_probs.load_reference_model"),
    "llmlingua2": ({"group_by": "llmlingua2", "importance_model": "importance"}, "llmlingua2.load_importance_model"),
}
LAYOUTS = {
    "packed": {"packing": True},
    "packed, evaluation not": {"packing": True, "eval_packing": False, "truncation_mode": "keep_end"},
    "not packed": {"truncation_mode": "keep_end"},
    "split": {"packing": True, "packing_strategy": "bfd_split"},
}


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_training_finds_every_score(method, layout, folder, capsys, monkeypatch):
    options, load = METHODS[method]
    keys = {
        "module": "hf_sft_variants.sft_go",
        **options,
        **LAYOUTS[layout],
        "model_name_or_path": "model",
        "dataset_name": "data",
        "output_dir": "run",
        "score_cache_dir": "scores",
        "max_length": 24,
        "max_steps": 1,
        "eval_strategy": "steps",
        "min_grouped_tokens": 2,
        **SMALL,
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    assert main(["score", "--config", "recipe.yaml"]) == 0
    assert "prepared recipe.yaml" in capsys.readouterr().out and not (folder / "run").exists()
    monkeypatch.setattr(f"hf_sft_variants.sft_go.{load}", lambda *args: pytest.fail("a model is loaded again"))
    training.main(SFTGOTrainer, SFTGOConfig, ["--config", "recipe.yaml"])
    assert (folder / "run" / "model.safetensors").is_file()
