"""
Undocumented parts of TRL, and of the `Trainer` under it, that this package uses, as of trl 1.16.0 and transformers
5.23.0. Any release may change them, so `tests/base/test_trl_internals.py` checks each name and says which is gone.

No other module imports names that TRL does not export.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import transformers.trainer
from huggingface_hub import HfApi
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import get_config_model_id, global_then_local_main_first


# Undocumented methods of `SFTTrainer`, its own or inherited, that we override or call, with the parameters we rely on
METHODS = {
    "_build_accelerator_args": ["kwargs"],
    "_get_train_sampler": ["train_dataset"],
    "_inner_training_loop": ["batch_size", "args", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_prepare_dataset": ["dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"],
    "_prepare_inputs": ["inputs"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "_reject_skip_prepare_without_labels": ["datasets", "data_collator"],
    "_save": ["output_dir", "state_dict"],
    "_set_signature_columns_if_needed": [],
}

# Undocumented attributes of an `SFTTrainer`
ATTRIBUTES = [
    "_created_lr_scheduler",
    "_metrics",
    "_name",
    "_paper",
    "_signature_columns",
    "_tag_names",
    "_tokenizer",
    "_total_train_tokens",
    "chat_template",
    "current_gradient_accumulation_steps",
    "padding_free",
    "router_aux_loss_coef",
]

__all__ = [
    "ATTRIBUTES",
    "METHODS",
    "DataCollatorForLanguageModeling",
    "get_config_model_id",
    "get_dataset_column_names",
    "global_then_local_main_first",
    "leave_out_of_push",
]


@contextmanager
def leave_out_of_push(patterns: list[str]) -> Iterator[None]:
    """
    Keep files out of what `Trainer` pushes of `output_dir`. It leaves out its checkpoints, and has no option for more.

    Args:
        patterns (`list[str]`):
            As `ignore_patterns` of [`~huggingface_hub.HfApi.upload_folder`].
    """
    make_api = transformers.trainer.hf_api
    transformers.trainer.hf_api = lambda: _SelectiveApi(make_api(), patterns)
    try:
        yield
    finally:
        transformers.trainer.hf_api = make_api


class _SelectiveApi:
    """The Hub's API, with further patterns to leave out of an uploaded folder."""

    def __init__(self, api: HfApi, patterns: list[str]):
        self._api, self._patterns = api, patterns

    def __getattr__(self, name):
        return getattr(self._api, name)

    def upload_folder(self, *, ignore_patterns=None, **options):
        return self._api.upload_folder(ignore_patterns=[*(ignore_patterns or []), *self._patterns], **options)
