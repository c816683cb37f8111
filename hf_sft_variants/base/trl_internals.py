"""
The only module that imports names TRL does not export. Read off trl 1.16.0; any release may move them, so
`tests/base/test_trl_internals.py` checks each of them and what we rely on.
"""

from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head, get_config_model_id, global_then_local_main_first


__all__ = [
    "DataCollatorForLanguageModeling",
    "add_fused_lm_head",
    "get_config_model_id",
    "get_dataset_column_names",
    "global_then_local_main_first",
]
