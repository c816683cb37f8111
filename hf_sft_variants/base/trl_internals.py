"""
What we use of TRL, and of the `Trainer` under it, beyond their documented names. Read off trl 1.16.0 and transformers
5.23.0; any release may move it, so `tests/base/test_trl_internals.py` checks each name and says which is gone.

No other module imports names that TRL does not export.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import transformers.trainer
from huggingface_hub import HfApi
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import get_config_model_id, global_then_local_main_first


# Methods of `SFTTrainer`, its own or inherited, that trainers here override or call, and the parameters they rely on
METHODS = {
    "_build_accelerator_args": ["kwargs"],
    "_get_num_items_in_batch": ["batch_samples", "device"],
    "_get_output_dir": ["trial"],
    "_get_train_sampler": ["train_dataset"],
    "_inner_training_loop": ["batch_size", "args", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_move_model_to_device": ["model", "device"],
    "_prepare_dataset": ["dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"],
    "_prepare_inputs": ["inputs"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "_reject_skip_prepare_without_labels": ["datasets", "data_collator"],
    "_save": ["output_dir", "state_dict"],
    "_save_checkpoint": ["model", "trial"],
    "_set_signature_columns_if_needed": [],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "create_model_card": ["model_name", "dataset_name", "tags"],
    "create_scheduler": ["num_training_steps", "optimizer"],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
    "get_tp_size": [],
    "log": ["logs", "start_time"],
    "push_to_hub": ["commit_message", "blocking", "token", "revision", "private", "kwargs"],
    "save_model": ["output_dir", "_internal_call"],
    "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
}

# Attributes that an `SFTTrainer` has
ATTRIBUTES = [
    "_created_lr_scheduler",
    "_metrics",
    "_name",
    "_paper",
    "_signature_columns",
    "_tag_names",
    "_tokenizer",
    "_total_train_tokens",
    "_train_batch_size",
    "accelerator",
    "aux_loss_enabled",
    "callback_handler",
    "chat_template",
    "completion_only_loss",
    "current_gradient_accumulation_steps",
    "data_collator",
    "is_deepspeed_enabled",
    "lr_scheduler",
    "model_wrapped",
    "optimizer",
    "padding_free",
    "place_model_on_device",
    "processing_class",
    "router_aux_loss_coef",
    "state",
    "train_dataset",
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
    Let `Trainer` push its `output_dir` without some files: it leaves out its checkpoints, and has no option for more.

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
    """The Hub's API, with more that is left out of a folder."""

    def __init__(self, api: HfApi, patterns: list[str]):
        self._api, self._patterns = api, patterns

    def __getattr__(self, name):
        return getattr(self._api, name)

    def upload_folder(self, *, ignore_patterns=None, **options):
        return self._api.upload_folder(ignore_patterns=[*(ignore_patterns or []), *self._patterns], **options)
