"""
The only module that imports names TRL does not export. Read off trl 1.16.0; any release may move them, so
`tests/base/test_trl_internals.py` checks each of them and what we rely on.
"""

import inspect
from typing import Any

from transformers import PreTrainedModel
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import (
    FusedCausalLMOutput,
    add_fused_lm_head,
    get_config_model_id,
    global_then_local_main_first,
    maybe_gather_lm_head_ctx,
)


__all__ = [
    "DataCollatorForLanguageModeling",
    "FusedCausalLMOutput",
    "add_fused_lm_head",
    "fused_lm_head_settings",
    "get_config_model_id",
    "get_dataset_column_names",
    "global_then_local_main_first",
    "maybe_gather_lm_head_ctx",
]


def fused_lm_head_settings(model: PreTrainedModel) -> dict[str, Any]:
    """
    What `add_fused_lm_head` made a model's fused LM head with: the closure of the forward it put there.

    Among them `final_logit_softcapping` and `logit_scale`, which it reads off the configurations of all the families.

    Raises:
        `ValueError`: If the model has no fused LM head, or not on top.
    """
    settings = inspect.getclosurevars(model.forward).nonlocals
    if "final_logit_softcapping" not in settings:
        raise ValueError("The model's forward is not that of TRL's fused LM head. Call `add_fused_lm_head` first.")
    return dict(settings)
