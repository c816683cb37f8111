"""Estimates what each recipe costs and writes the tables in `README.md`, which explains the formulas."""

import re
from pathlib import Path
from typing import NamedTuple

import yaml


FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
BEGIN, END = "<!-- written by recipes/cost.py -->", "<!-- until here -->"

PEAK_FLOPS = {"H100": 989e12, "A100": 312e12}  # per second: bfloat16 without sparsity, NVIDIA's data sheets
UTILISATION = 0.35  # share of the peak that a run reaches, padding included: assumed
QLORA_SLOWDOWN = 1.3  # Llama 2 7B in 4 bits against bfloat16: LitGPT's finetune_lora.md, 1136 s against 876 s
FOUR_BIT = (4 + 0.127) / 8  # bytes of a weight, with double quantization: section 3 of the QLoRA paper
TRAINED = 16  # bytes per trained parameter: weight 4, gradient 4, Adam's moments 8; DeepSpeed: 2 + 2 + 4 + 8
# Bytes that a layer saves per token for the backward pass, per unit of hidden, MLP and key-value size, in bfloat16:
# counted with saved-tensor hooks on transformers' Llama. LoRA also saves the adapters' inputs around dropout.
LAYER_BYTES = {"full": (20, 8, 4), "lora": (49, 12, 4)}
HEAD_TILE = 2**27 + 4096 * 4096 * 2  # bytes of logits that the LM head keeps or holds at a time
GPUS = 8  # processes in TRL's own accelerate configs, if a recipe has no `num_processes`
OVERHEAD = 2e9  # bytes for the CUDA context, NCCL and fragmentation: assumed
LLMLINGUA2 = 0.3e9  # parameters of XLM-RoBERTa large without embeddings, the scoring model of `llmlingua2`
BASELINE_MINUTES = 4  # 240 rows on 2 CPU cores: 30 steps of 7.5 s, with the settings of `sft_baseline.yaml`


class Model(NamedTuple):
    """Sizes from a model's `config.json`; `kv` is the size of all key-value heads together."""

    layers: int
    hidden: int
    mlp: int
    kv: int
    vocab: int
    tied: bool = False

    @property
    def layer(self) -> int:
        return self.hidden * (2 * self.hidden + 2 * self.kv + 3 * self.mlp)

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.head * (1 if self.tied else 2)

    @property
    def in_products(self) -> int:
        """Parameters that take part in matrix products: all but the embeddings."""
        return self.layers * self.layer + self.head

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA adapter on all linear layers."""
        return rank * self.layers * (4 * self.hidden + 2 * (self.hidden + self.kv) + 3 * (self.hidden + self.mlp))


MISTRAL_7B = Model(32, 4096, 14336, 1024, 32000)
LLAMA_8B = Model(32, 4096, 14336, 1024, 128256)
SMOLLM2_135M = Model(30, 576, 1536, 192, 49152, tied=True)
MODELS = {
    "01-ai/Yi-6B-Chat": Model(32, 4096, 11008, 512, 64000),
    "HuggingFaceTB/SmolLM3-3B-Base": Model(36, 2048, 11008, 512, 128256, tied=True),
    "Qwen/Qwen2.5-1.5B": Model(28, 1536, 8960, 256, 151936, tied=True),
    "Qwen/Qwen2.5-3B": Model(36, 2048, 11008, 256, 151936, tied=True),
    "Qwen/Qwen2.5-7B": Model(28, 3584, 18944, 512, 152064),
    "Qwen/Qwen2.5-14B": Model(48, 5120, 13824, 1024, 152064),
    "Qwen/Qwen3-8B-Base": Model(36, 4096, 12288, 1024, 151936),
    "alignment-handbook/zephyr-7b-sft-full": MISTRAL_7B,
    "meta-llama/Llama-3.1-8B": LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
    "meta-llama/Llama-3.2-3B": Model(28, 3072, 8192, 1024, 128256, tied=True),
    "meta-llama/Meta-Llama-3-8B": LLAMA_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_8B,
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B,
    "quickstart/model": SMOLLM2_135M,
    "quickstart/runs/sft_baseline": SMOLLM2_135M,
    "runs/poft_mistral-7b_ultrachat": MISTRAL_7B,
}

# Examples and tokens per example: bytes of text according to the data set's card, at 4.4 bytes per token of English
# prose, template included
DATA = {
    "HuggingFaceH4/ultrachat_200k": (207_865, 1300),
    "allenai/tulu-3-sft-mixture": (939_343, 750),
    "data/alpaca": (52_002, 130),
    "data/cot-collection": (100_000, 300),
    "data/gsm8k": (7_473, 190),
    "data/lima": (1_030, 650),
    "data/medalpaca": (263_000, 150),  # the paper's number of examples
    "data/openbookqa": (4_957, 120),
    "data/openhermes": (242_831, 300),
    "data/openr1-math": (93_733, 5300),  # 16 kB per solution, at 3 bytes per token for formulas
    "data/sharegpt": (94_145, 1600),
    "quickstart/data": (240, 70),
    "quickstart/tagged_data": (240, 70),
    "trl-lib/ultrafeedback_binarized": (62_135, 860),  # both answers
}


def is_dpo(recipe: dict) -> bool:
    return "module" not in recipe and "use_peft" not in recipe


def references(recipe: dict) -> list[Model]:
    names = recipe.get("reference_models", []) + ([recipe["reference_model"]] if "reference_model" in recipe else [])
    return [MODELS[name] for name in names]


def training_memory(recipe: dict) -> float:
    """Bytes on each GPU, with every row as long as `max_length`."""
    model = MODELS[recipe["model_name_or_path"]]
    uses_lora, rows = recipe.get("use_peft", False), recipe["per_device_train_batch_size"] * (1 + is_dpo(recipe))
    tokens = rows * recipe["max_length"]
    hidden, mlp, kv = LAYER_BYTES["lora" if uses_lora else "full"]
    layer = tokens * (hidden * model.hidden + mlp * model.mlp + kv * model.kv)
    checkpoints = tokens * model.layers * model.hidden * 2
    head = HEAD_TILE + 4 * tokens * model.hidden
    if uses_lora:
        states = frozen_memory(recipe, model) + TRAINED * model.adapter(recipe["lora_r"])
    else:
        # Gathered while in use: embeddings, head and two layers in bfloat16, and the head's gradient
        gathered = 2 * (model.parameters - (model.layers - 2) * model.layer) + 4 * model.head
        states = (TRAINED + 2 * is_dpo(recipe)) * model.parameters / recipe.get("num_processes", GPUS) + gathered
    return states + layer + checkpoints + head + OVERHEAD


def frozen_memory(recipe: dict, model: Model) -> float:
    if not recipe.get("load_in_4bit", False):
        return 2 * model.parameters
    in_layers = model.layers * model.layer
    weights = FOUR_BIT * in_layers + 2 * (model.parameters - in_layers)
    return weights * (2 if "confidence_source" in recipe else 1)  # SFTMix keeps its model in memory, too


def scoring_memory(recipe: dict, model: Model) -> float:
    """Bytes on each GPU while a reference model in bfloat16 scores the data."""
    layer = recipe.get("reference_batch_tokens", 4096) * (20 * model.hidden + 8 * model.mlp)
    return 2 * model.parameters + layer + HEAD_TILE + OVERHEAD


def memory(recipe: dict) -> float:
    return max([training_memory(recipe), *(scoring_memory(recipe, model) for model in references(recipe))])


def flops(recipe: dict) -> float:
    """Operations of a whole run, including the passes that a method adds."""
    model = MODELS[recipe["model_name_or_path"]]
    examples, length = DATA[recipe["datasets"][0]["path"] if "datasets" in recipe else recipe["dataset_name"]]
    epochs = recipe["num_train_epochs"]  # for SFTKey, of all stages together
    passes = epochs * (4 if recipe.get("use_peft", False) else 6)
    passes += epochs * 2 * recipe.get("gradient_checkpointing", True)
    passes += epochs * 2 * is_dpo(recipe)
    if recipe.get("confidence_source") == "reference":  # SFTMix trains twice, and reads the data at each checkpoint
        passes = 2 * passes + 2 * max(epochs, 3)
    scorers = sum(reference.in_products for reference in references(recipe))
    scorers += LLMLINGUA2 * (recipe.get("group_by") == "llmlingua2")
    return examples * length * (passes * model.in_products + 2 * scorers)


def hours(recipe: dict, gpu: str) -> float:
    slowdown = QLORA_SLOWDOWN if recipe.get("load_in_4bit", False) else 1
    return slowdown * flops(recipe) / (PEAK_FLOPS[gpu] * UTILISATION) / 3600


def read(pattern: str) -> dict[str, dict]:
    """Recipes by their path in this folder."""
    return {str(path.relative_to(FOLDER)): yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob(pattern))}


def row(name: str, *cells: str | float) -> str:
    texts = [cell if isinstance(cell, str) else f"{float(f'{cell:.2g}'):g}" for cell in cells]
    return f"| [`{name}`](./{name}) | {' | '.join(texts)} |"


def tables() -> str:
    lines = ["| recipe | trains | GPUs | GiB on each | GPU hours, H100 | GPU hours, A100 |", "|" + " --- |" * 6]
    for name, recipe in read("[ps]*/*.yaml").items():
        trains = "QLoRA" if "load_in_4bit" in recipe else "LoRA" if "use_peft" in recipe else "full"
        gpu_hours = [hours(recipe, gpu) for gpu in PEAK_FLOPS]
        lines.append(row(name, trains, recipe.get("num_processes", GPUS), memory(recipe) / 2**30, *gpu_hours))
    lines += ["", "| recipe | minutes on 2 CPU cores |", "| --- | --- |"]
    recipes = read("quickstart/*.yaml")
    baseline = flops(recipes["quickstart/sft_baseline.yaml"])
    lines += [row(name, BASELINE_MINUTES * flops(recipe) / baseline) for name, recipe in recipes.items()]
    return "\n".join(lines)


def filled(readme: str) -> str:
    """The README with its tables regenerated."""
    return re.sub(f"(?<={BEGIN}\n).*(?=\n{END})", tables(), readme, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
