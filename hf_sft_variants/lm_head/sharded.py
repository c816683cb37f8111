"""Whole parameters where a strategy shards them: FSDP2's DTensors and DeepSpeed ZeRO-3's partitions."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.distributed.tensor import DTensor


def whole(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """The full tensor of a DTensor; its gradient is scattered again."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def gathered(*parameters: torch.Tensor | None) -> AbstractContextManager:
    """
    Gather what ZeRO-3 has partitioned. The module's hook does not do so, because we use its weight without calling it.

    A parameter that is gathered already, as tied embeddings may be, is left to the module that gathered it.
    """
    partitioned = {id(p): p for p in parameters if hasattr(p, "ds_status") and p.ds_status.name != "AVAILABLE"}
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(partitioned.values()))
