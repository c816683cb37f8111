"""
The cases that `test_processes.py` runs on one process, and `trl sft` on two.

As a program, launched with a configuration from `recipes/accelerate`: runs all cases, writes their results, and then
trains the recipe it was launched with.
"""

import gc
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import DistributedType, ParallelismConfig, PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from helpers import STRATEGIES, make_trainer
from methods import METHODS, SFT, with_references
from peft import LoraConfig
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer import sft_trainer

from hf_sft_variants.launch import training
from hf_sft_variants.scoring import shards


# Sixteen rows are two optimizer steps of an epoch; on one process with twice the accumulation
STEPS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "optim": "adamw_torch",
    "adam_epsilon": 1e-4,  # the default makes steps of full size of gradients that are rounding errors
    "max_grad_norm": 1.0,
    "save_strategy": "no",
}
SAVING = {"save_strategy": "steps", "save_steps": 2}
# Of eleven rows, the last batch is smaller, and accelerate repeats rows so that each process has the same number. With
# SGD, because Adam makes steps of full size of gradients that are rounding errors
UNEVEN = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.3}
SEPARATE_COUNTS = {**UNEVEN, "max_steps": 1, "average_tokens_across_devices": False}

RANDOM_PAIRS = {"confidence_split": "random"}
AS_USED = {name: dict(method.options) for name, method in METHODS.items()}
if "sftkey" in AS_USED:
    AS_USED["sftkey"] |= {"stages": ["full", "key"]}  # with a fresh optimizer in between
if "weighted" in AS_USED:
    AS_USED["weighted"] |= {"example_weight_column": "quality"}
# Each strategy is launched with the recipe of another method
RECIPE_METHODS = dict(
    zip(STRATEGIES, [name for name in ("sft_go", "sftmix", "sftkey", "poft", "base") if name in METHODS], strict=False)
)


@dataclass
class Case:
    """A run of a method, or of "sft", on the rows of a file with a saved model."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    rows: str = "texts"
    model: str = "untied"
    is_loaded: bool = False  # the trainer gets the model itself, not its folder
    lora: bool = False
    eval_rows: str | None = None
    resumes: str | None = None  # from another case's checkpoint after two steps


def available(cases: dict[str, Case]) -> dict[str, Case]:
    return {name: case for name, case in cases.items() if case.method in {*METHODS, "sft"}}


def cases_like_one_process(folder: Path) -> dict[str, Case]:
    """These are equal on any number of processes."""
    cases = {name: Case(name, {**options, **SAVING}, eval_rows="texts") for name, options in AS_USED.items()}
    if "sftkey" in cases:
        cases["sftkey"].options |= {"answer_eval_steps": 2, "answer_eval_max_new_tokens": 6}
    cases["sft_go_lora"] = Case("sft_go", {**AS_USED.get("sft_go", {}), "max_steps": 2}, lora=True)
    cases["sftmix_lora"] = Case("sftmix", {**RANDOM_PAIRS, "max_steps": 2}, lora=True)
    # One process without a pair
    packed = {"packing": True, "max_length": 40, "per_device_train_batch_size": 1, "max_steps": 1, "seed": 5}
    cases["sftmix_packed"] = Case("sftmix", {**RANDOM_PAIRS, **packed}, rows="eight_tokens")
    # A reference to train first; LM heads with a bias, and one that shares its weights
    cases["sftmix_reference"] = Case("sftmix", model="biased")
    cases["sftmix_copied"] = Case("sftmix", model="biased", is_loaded=True)
    cases["sftmix_online"] = Case("sftmix", {"confidence_source": "online"}, model="tied")
    return available(cases | {f"{name}_found": case for name, case in scoring_cases(folder, "one").items()})


def scoring_cases(folder: Path, scores_of: str) -> dict[str, Case]:
    """A reference model scores the data first, unless the scores are cached."""
    reference, scores = str(folder / "reference"), {"score_cache_dir": str(folder / f"scores_of_{scores_of}")}
    # Few tokens in a batch, so that there are several for each process
    poft = {**scores, "reference_models": [reference], "reference_batch_tokens": 100, "max_steps": 1}
    sft_go = {**scores, **AS_USED.get("sft_go", {}), "score_batch_tokens": 100, "max_steps": 1}
    llmlingua2 = {"group_by": "llmlingua2", "importance_model": str(folder / "importance")}
    return available(
        {
            "poft_scored": Case("poft", poft, rows="unscored_texts"),
            "sft_go_rho1": Case("sft_go", {**sft_go, "group_by": "rho1", "reference_model": reference}),
            "sft_go_llmlingua2": Case("sft_go", {**sft_go, **llmlingua2}),
        }
    )


def cases_in_bfloat16() -> dict[str, Case]:
    """Responses with more tokens than bfloat16 can count."""
    options = {"bf16": True, "max_length": 400, "max_steps": 1}
    own = {**AS_USED, "sftkey": {"stages": ["full"], "key_loss_weight": 3.7}}
    return available({f"{name}_bf16": Case(name, {**own[name], **options}, rows="long") for name in own})


def control_cases() -> dict[str, Case]:
    """Each method's control, and `SFTTrainer`, where two processes differ from one."""
    cases = {}
    for name, options in (("uneven", UNEVEN), ("separate", SEPARATE_COUNTS)):
        for method, description in METHODS.items():
            cases[f"{name}_{method}"] = Case(method, {**description.control, **options}, control_rows(method))
        cases |= {f"{name}_sft_{rows}": Case("sft", options, rows) for rows in map(control_rows, METHODS)}
    return cases


def control_rows(method: str) -> str:
    return "equal_tokens" if method == "poft" else "tokens"


def resumed_cases() -> dict[str, Case]:
    return {f"{name}_resumed": Case(name, options, resumes=name) for name, options in AS_USED.items()}


def make_trainer_of(case: Case, folder: Path, output_dir: Path, **options):
    """The trainer loads the model, as in `trl sft`: where weights are sharded, that is part of it."""
    model = str(folder / case.model)
    return make_trainer(
        *(SFT if case.method == "sft" else METHODS[case.method].classes),
        AutoModelForCausalLM.from_pretrained(model) if case.is_loaded else model,
        AutoTokenizer.from_pretrained(folder / case.model),
        load_rows(folder, case.rows),
        output_dir,
        eval_dataset=load_rows(folder, case.eval_rows) if case.eval_rows else None,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if case.lora else None,
        **{**STEPS, **case.options, **options},
    )


def load_rows(folder: Path, name: str) -> Dataset:
    return Dataset.from_json(str(folder / f"{name}.jsonl"), cache_dir=str(folder / "cache"))


def result_of(trainer) -> dict[str, Any]:
    """Everything the tests compare. All processes must call it. Flips are left out: each process counts its own."""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    evaluation = trainer.evaluate() if trainer.eval_dataset is not None else {}
    names = [name for name in logs[-1] if name == "nll" or ("/" in name and name != "sft_go/flip_rate")]
    return {
        "losses": [log["loss"] for log in logs],
        "metrics": {name: logs[-1][name] for name in names},
        "evaluation": {name: value for name, value in evaluation.items() if name.endswith(("loss", "nll"))},
        "weights": trainer.accelerator.get_state_dict(trainer.model_wrapped),
        "halves": getattr(trainer, "halves", None),
        "answers": [
            callback._generate(callback.rows[""][0])
            for callback in trainer.callback_handler.callbacks
            if type(callback).__name__ == "AnswerAccuracyCallback"
        ],
    }


def write_rows(folder: Path, token_rows: Dataset) -> None:
    """All data sets of the cases, and the one of the recipes."""
    texts = Dataset.from_list([text_row(row) for row in range(16)])
    texts.to_json(folder / "unscored_texts.jsonl")
    with_references(texts).to_json(folder / "texts.jsonl")
    with_references(texts).to_json(folder / "data" / "train.jsonl")
    token_rows.select(range(8)).to_json(folder / "eight_tokens.jsonl")
    token_rows.select(range(11)).to_json(folder / "tokens.jsonl")
    five_labels = [
        {"input_ids": ids, "labels": [-100] * (len(ids) - 5) + ids[-5:]}
        for ids in token_rows["input_ids"]
        if len(ids) > 5
    ]
    Dataset.from_list(five_labels[:11]).to_json(folder / "equal_tokens.jsonl")
    with_references(Dataset.from_list([long_row(row) for row in range(8)])).to_json(folder / "long.jsonl")


def text_row(row: int) -> dict[str, str]:
    completion = f"{' one more' * (row * 5 % 7 + 1)} is {row * 8}"
    return {
        "prompt": f"What is {row} plus {row * 7}?",
        "completion": completion,
        "answer": str(row * 8),
        "quality": 0.3 + row * 3 % 7,
    }


def long_row(row: int) -> dict[str, list[int]]:
    length = 300 + 9 * row
    input_ids = [3 + (row + 1) * (position + 5) ** 2 % 290 for position in range(length)]
    return {
        "input_ids": input_ids,
        "labels": [-100] * 4 + input_ids[4:],
        "key_mask": [int(position > 20 * row + 20) for position in range(length)],
        "quality": 0.3 + row,
    }


PARALLELISM = {
    "fsdp2": {"cp_size": 2},
    "zero3": {"sp_size": 2, "sp_backend": "deepspeed"},
}


def allow_fsdp_on_the_cpu():
    """Accelerate shards on accelerators only: FSDP on the CPU is plain DDP, without a warning."""
    make_state = AcceleratorState.__init__

    def make_state_of_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        make_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = make_state_of_fsdp


def watch_device_maps():
    """Without a device map, a model is spread over all GPUs, except under plain DDP."""
    load = sft_trainer.create_model_from_path

    def load_on_one_device(*args, **kwargs):
        assert "device_map" in kwargs or PartialState().distributed_type == DistributedType.MULTI_CPU
        return load(*args, **kwargs)

    sft_trainer.create_model_from_path = load_on_one_device


def do_not_compile_deepspeed():
    """Its own operator for sums over CPU processes takes a minute to compile; without it gloo is used."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def keep_no_weights_together(trainer):
    """By default, ZeRO-3 keeps up to a billion gathered weights."""
    trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"] |= {
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
    }


def is_ddp(wrapped, head) -> bool:
    return isinstance(wrapped, DistributedDataParallel) and head.dim() == 2


def is_fsdp2(wrapped, head) -> bool:
    all_sharded = all(isinstance(parameter, DTensor) for parameter in wrapped.parameters())
    return isinstance(wrapped, FSDPModule) and all_sharded and head.to_local().size(0) == head.size(0) / 2


def is_zero2(wrapped, head) -> bool:
    """The weights are whole, the optimizer has half of what is trained (rounded up for each of its groups)."""
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    mine = sum(shard.numel() for shard in wrapped.optimizer.single_partition_of_fp32_groups)
    return wrapped.zero_optimization_stage() == 2 and head.dim() == 2 and trained / 2 <= mine < trained / 2 + 64


def is_zero3(wrapped, head) -> bool:
    return wrapped.zero_optimization_stage() == 3 and head.ds_tensor.numel() == head.ds_numel / 2


class AssertStrategy(TrainerCallback):
    """A launch that silently runs one process, or shards nothing, would prove nothing."""

    def __init__(self, strategy, trainer):
        self.is_right = {"ddp": is_ddp, "fsdp2": is_fsdp2, "zero2": is_zero2, "zero3": is_zero3}[strategy]
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert args.world_size == torch.distributed.get_world_size() == 2
        assert self.is_right(self.trainer.model_wrapped, model.get_output_embeddings().weight)


def run(case, folder, output_dir, **options):
    """The result of a case, or the error message that refuses it."""
    gc.freeze()  # a run collects garbage several times, which takes longer the more has been imported
    try:
        trainer = make_trainer_of(case, folder, output_dir, **options)
    except ValueError as error:
        return {"refused": str(error)}
    strategy = output_dir.parent.name
    if strategy == "zero3":
        keep_no_weights_together(trainer)
    trainer.add_callback(AssertStrategy(strategy, trainer))
    trainer.train(str(output_dir.with_name(case.resumes) / "checkpoint-2") if case.resumes else None)
    return result_of(trainer)


def refusals(folder, strategy):
    """Each method's error message for samples whose tokens are spread over several processes."""
    return {
        f"{name}_sharded": run(
            Case(name, method.control, control_rows(name)),
            folder,
            folder / strategy / "sharded",
            parallelism_config=ParallelismConfig(**PARALLELISM[strategy]),
        )
        for name, method in METHODS.items()
    }


def train_recipe(strategy):
    """As `python -m hf_sft_variants.<method>` does."""
    method = METHODS[RECIPE_METHODS[strategy]]

    class CheckedTrainer(method.trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(AssertStrategy(strategy, self))

    training.main(CheckedTrainer, method.config_class)


def main(path: Path):
    shards.BATCHES_PER_SHARD = 1  # so that the few rows are shards for both processes
    allow_fsdp_on_the_cpu()
    watch_device_maps()
    folder, strategy = path.parent.parent, path.parent.name
    if strategy.startswith("zero"):
        do_not_compile_deepspeed()
    cases = cases_like_one_process(folder) | resumed_cases() | cases_in_bfloat16() | control_cases()
    cases |= scoring_cases(folder, strategy)
    results = {name: run(case, folder, path.parent / name) for name, case in cases.items()}
    if strategy in PARALLELISM:
        results |= refusals(folder, strategy)
    if PartialState().is_main_process:
        torch.save(results, path.parent / "results.pt")
    train_recipe(strategy)


if __name__ == "__main__":
    main(Path(sys.argv[sys.argv.index("--config") + 1]).absolute())
    # On a normal exit, a thread that is still running sometimes aborts the process
    sys.stdout.flush()
    os._exit(0)
