import gc
import os
import random
from functools import partial
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # SFTTrainer refuses nn.DataParallel
os.environ.setdefault("TRITON_INTERPRET", "1")  # runs the kernels on a CPU; 0 with a GPU

import datasets
import pytest
import torch
from fixtures.chat_templates import CHATML
from other_process import OtherProcess
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed


pytest_plugins = ["matrix.table"]

CORPUS = [
    "What is 12 plus 30? Add the tens, then the ones. The sum is 42.",
    "A farmer has 7 cows and buys 5 more; how many cows does the farmer have?",
    "Work step by step, one step a line. 7 + 5 = 12\n#### 12",
]


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """Each run collects garbage several times; scanning the imported modules takes a third of a second each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def other_process():
    """Runs functions of test modules in another process, which takes ten seconds to start."""
    process = OtherProcess(*Path(__file__).parent.glob("*/"))
    yield process
    process.close()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE with a ChatML template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model_factory(tokenizer):
    """Makes Llamas of two layers by default, each with the same random weights."""
    return partial(make_tiny_model, tokenizer)


@pytest.fixture
def tiny_model(tiny_model_factory) -> LlamaForCausalLM:
    return tiny_model_factory()


def make_tiny_model(tokenizer: PreTrainedTokenizerFast, num_hidden_layers: int = 2) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def token_rows() -> datasets.Dataset:
    """Sixteen pre-tokenized rows of 3 to 30 tokens with masked prompts, some with few labels."""
    generator = torch.Generator().manual_seed(1)
    rows = {"input_ids": [], "labels": []}
    for length in (30, 3, 17, 12, 25, 8, 21, 14, 29, 5, 11, 19, 4, 23, 16, 27):
        input_ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        num_prompt_tokens = length // 4
        rows["input_ids"].append(input_ids)
        rows["labels"].append([-100] * num_prompt_tokens + input_ids[num_prompt_tokens:])
    return datasets.Dataset.from_dict(rows)


@pytest.fixture(scope="session")
def chat_rows() -> datasets.Dataset:
    """Twelve prompt/completion conversations with different arithmetic."""
    pairs = [(first, second) for first in (3, 14, 25, 36) for second in (2, 17, 58)]
    return datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {first} plus {second}?"}],
                "completion": [
                    {"role": "assistant", "content": f"Add the ones, then the tens.\n#### {first + second}"}
                ],
            }
            for first, second in pairs
        ]
    )


@pytest.fixture(scope="session")
def random_texts() -> list[str]:
    """Two hundred texts of two to twelve words, with numbers, accents, emoji and line breaks among them."""
    generator = random.Random(4)
    words = [*" ".join(CORPUS).split(), "naïve", "日本", "🙂", "x\ty", "\n", "1,036.5"]
    return [" ".join(generator.choices(words, k=generator.randint(2, 12))) for _ in range(200)]
