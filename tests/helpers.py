"""Shared by the test modules: small trainers, the loss and gradients of one optimizer step, slow computations."""

import copy
import importlib.metadata
from functools import cache

import pyarrow.parquet as pq
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback


# Accelerate parses PEFT's and DeepSpeed's metadata in every training step, which takes longer than a tiny model's step
importlib.metadata.metadata = cache(importlib.metadata.metadata)

SMALL = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "logging_steps": 1}

# Launches of tests/distributed/test_slurm.py and tests/matrix/test_processes.py, which README and docs name
SBATCH = "sbatch recipes/accelerate/slurm.sh recipes/accelerate/fsdp2.yaml hf_sft_variants.sft_go --config RECIPE.yaml"
LAUNCH = "trl sft --config RECIPE.yaml --accelerate_config recipes/accelerate/{}.yaml"
STRATEGIES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3"}


class GradientRecorder(TrainerCallback):
    """Keeps a copy of every gradient of the first optimizer step."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            model = model.module if hasattr(model, "module") else model
            self.gradients = {
                name: parameter.grad.detach().clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }


def make_trainer(trainer_class, config_class, model, tokenizer, rows, output_dir, **options):
    """A trainer on a copy of the model, deterministic and small; `options` go to the configuration."""
    names = ("eval_dataset", "peft_config", "callbacks", "formatting_func")
    trainer_options = {name: options.pop(name) for name in names if name in options}
    args = config_class(str(output_dir), **{**SMALL, "max_length": 64, "max_grad_norm": 0, **options})
    return trainer_class(copy.deepcopy(model), args, train_dataset=rows, processing_class=tokenizer, **trainer_options)


def one_step(*args, **options):
    """Loss as logged and gradients of one optimizer step; arguments as of [`make_trainer`]."""
    log, gradients = one_step_log(*args, **options)
    return log["loss"], gradients


def one_step_log(trainer_class, config_class, model, tokenizer, rows, output_dir, **options):
    """All that is logged, and gradients of one optimizer step."""
    recorder = GradientRecorder()
    options = {"max_steps": 1, "save_strategy": "no", "train_sampling_strategy": "sequential", **options}
    trainer = make_trainer(
        trainer_class, config_class, model, tokenizer, rows, output_dir, callbacks=[recorder], **options
    )
    trainer.train()
    return trainer.state.log_history[0], recorder.gradients


def assert_same_gradients(first, second, tolerance=0.0):
    """The gradients equal to the last bit, or as one vector up to the tolerance relative to its norm."""
    assert first.keys() == second.keys() and first
    if tolerance == 0:
        for name in first:
            assert torch.equal(first[name], second[name]), name
    error, norm = (
        torch.cat([values.double().flatten() for values in vectors]).norm()
        for vectors in ([first[name] - second[name] for name in first], first.values())
    )
    assert norm > 0 and error <= tolerance * norm, f"{error} of {norm}"


def padded_document_log_probs(model, input_ids, labels):
    """Log-probabilities of one document's labels from the model's own logits, without any fused head."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([input_ids])).logits[0, :-1].double()
    return [
        logits[position - 1].log_softmax(-1)[label].item() if label != -100 else None
        for position, label in enumerate(labels)
        if position > 0
    ]


def scores_in(folder):
    """Scores in a cache folder, by model and settings, then by the example's key."""
    scores = {}
    for path in folder.glob("*/*.parquet"):
        rows = pq.read_table(path).to_pylist()
        scores.setdefault(path.parent.name, {}).update({row.pop("example_key"): row for row in rows})
    return scores


def save_models(folder, model, tokenizer):
    """Saves a model, and another one as its reference."""
    for name in ("model", "reference"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        model.model.embed_tokens.weight.data.mul_(1.1)


def slow_nll(model, tokenizer, rows):
    """Negative log-likelihood of the completions in nats per token: dense logits, one row at a time, in float64."""
    terms = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        prompt_ids, ids = tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"]
        assert ids[: len(prompt_ids)] == prompt_ids
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        # From the right, because prompt learning prepends virtual tokens
        terms += [-log_probs[i - len(ids) - 1, ids[i]].item() for i in range(len(prompt_ids), len(ids))]
    return sum(terms) / len(terms)


def commit_of(repository, digit):
    """The folder of a commit in the Hub's cache; the branch `main` now points to it."""
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(digit * 40)
    folder = repository / "snapshots" / (digit * 40)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Operations(TorchDispatchMode):
    """Counts the multiplications of each matrix product, and records the largest tensor returned."""

    def __init__(self):
        super().__init__()
        self.products = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "einsum", "dot", "mv", "_grouped_mm"):
            left, right = [arg for arg in args if torch.is_tensor(arg)][-2:]
            self.products.append(left.numel() * right.shape[-1])
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if torch.is_tensor(tensor):
                self.largest = max(self.largest, tensor.numel())
        return result
