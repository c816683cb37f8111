"""
Started by `trl sft` with one of `recipes/accelerate`: runs the cases on two processes, writes what became of them, and
at last trains by the recipe that it was started with.
"""

import gc
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import DistributedType, ParallelismConfig, PartialState
from accelerate.state import AcceleratorState
from methods import METHODS
from process_cases import (
    RECIPE_METHODS,
    Case,
    cases_in_bfloat16,
    cases_like_one_process,
    control_cases,
    control_rows,
    make_trainer_of,
    result_of,
    resumed_cases,
    scoring_cases,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback
from trl.trainer import sft_trainer

from hf_sft_variants import recipe
from hf_sft_variants.scoring import shards


PARALLELISM = {
    "fsdp2": {"cp_size": 2},
    "zero3": {"sp_size": 2, "sp_backend": "deepspeed"},
}


def allow_fsdp_on_the_cpu():
    """Accelerate shards on accelerators alone: of FSDP on the CPU it makes plain DDP without a word."""
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
    """On GPUs a model that is loaded without one is spread over all of them, unless the processes are plain DDP's."""
    load = sft_trainer.create_model_from_path

    def load_on_one_device(*args, **kwargs):
        assert "device_map" in kwargs or PartialState().distributed_type == DistributedType.MULTI_CPU
        return load(*args, **kwargs)

    sft_trainer.create_model_from_path = load_on_one_device


def do_not_compile_deepspeed():
    """Its own operator for sums over a CPU's processes takes a minute to compile; without it they go through gloo."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def keep_no_weights_together(trainer):
    """By default ZeRO-3 takes weights apart after use only where they are more than a billion numbers."""
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
    """A launch that quietly runs one process, or shards nothing, would prove nothing."""

    def __init__(self, strategy, trainer):
        self.is_right = {"ddp": is_ddp, "fsdp2": is_fsdp2, "zero2": is_zero2, "zero3": is_zero3}[strategy]
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert args.world_size == torch.distributed.get_world_size() == 2
        assert self.is_right(self.trainer.model_wrapped, model.get_output_embeddings().weight)


def run(case, folder, output_dir, **options):
    """What became of a case, or the words that it is refused with."""
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
    """What each method says of samples whose tokens lie on several processes."""
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
    """What `python -m hf_sft_variants.<method>` does, and nothing is left to do after it."""
    method = METHODS[RECIPE_METHODS[strategy]]

    class CheckedTrainer(method.trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(AssertStrategy(strategy, self))

    recipe.main(CheckedTrainer, method.config_class)


def main(path: Path):
    gc.freeze()  # each run collects garbage several times, else among all the objects of the imports
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
    # All is done and written; a process that ends by itself is now and then aborted by a thread that still runs
    sys.stdout.flush()
    os._exit(0)
