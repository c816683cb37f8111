"""Two processes train with an `AnswerAccuracyCallback` and without, and each writes its results."""

import json
from pathlib import Path

import torch
from datasets import Dataset
from helpers import make_trainer
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_sft_variants.evaluation import generate_answers
from hf_sft_variants.sftkey import answer_accuracy
from hf_sft_variants.sftkey.answer_accuracy import AnswerAccuracyCallback


def train_and_answer(folder: str) -> None:
    folder = Path(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows, held_out = (
        Dataset.from_json(str(folder / f"{name}.jsonl"), cache_dir=str(folder / "cache"))
        for name in ("rows", "held_out")
    )
    own_prompts = []

    def generate(model, tokenizer, prompts, *args, **options):
        own_prompts[:] = prompts
        return generate_answers(model, tokenizer, prompts, *args, **options)

    answer_accuracy.generate_answers = generate
    options = {"max_steps": 3, "save_strategy": "no", "per_device_train_batch_size": 2}
    alone, watched = (
        make_trainer(SFTTrainer, SFTConfig, model, tokenizer, rows, folder / "run", **options) for _ in range(2)
    )
    callback = AnswerAccuracyCallback(watched, held_out, steps=2, max_new_tokens=8, batch_size=3)
    watched.add_callback(callback)
    alone.train()
    watched.train()
    assert isinstance(watched.model_wrapped, DistributedDataParallel)
    results = {
        "log": [entry for entry in watched.state.log_history if "sftkey/score" in entry],
        "generations": callback._generate(held_out["prompt"][:]),
        "generations_of_one": generate_answers(watched.model, tokenizer, held_out["prompt"], 8),
        "rows": [held_out["prompt"][:].index(prompt) for prompt in own_prompts],
        "weights_equal": all(map(torch.equal, watched.model.parameters(), alone.model.parameters())),
    }
    assert [entry["step"] for entry in results["log"]] == [2, 3]
    (folder / f"results{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
