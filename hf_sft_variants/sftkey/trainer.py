import textwrap
from copy import copy
from functools import wraps
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from ..base import AnnotatedBatch, AnnotatedSFTTrainer
from ..base.preparation import map_description
from ..base.trl_internals import get_dataset_column_names, global_then_local_main_first
from ..errors import InputError
from ..text.key_finder import KeyFinder
from .answer_accuracy import AnswerAccuracyCallback
from .config import FULL, KEY, SFTKeyConfig
from .key_mask import KeyMask, add_key_mask, has_whole_key, tag_responses
from .stages import StageSwitchCallback, stage_at, staged_scheduler


logger = get_logger(__name__)


class SFTKeyTrainer(AnnotatedSFTTrainer):
    """
    Trainer for SFTKey, which trains on the whole response first and then on the answer alone.

    A run consists of stages ([`SFTKeyConfig`]). In a `"full"` stage, the loss is that of [`~trl.SFTTrainer`]. In a
    `"key"` stage, it is the mean over the key tokens of the optimizer step: the answer and what follows it to the end
    of its turn. The reasoning remains in the input, but without labels. One `train()` runs all stages; each has its
    own warm-up and schedule and, by default, starts with a fresh optimizer. Takes the arguments of
    [`~trl.SFTTrainer`]. Method: [SFTKey](https://huggingface.co/papers/2512.21017). We know of no official code. The
    paper gives plain sums; the mean, the fresh optimizer and the schedule of the second stage are our choices.

    Evaluation reports the loss on the whole response in every stage, so that `eval_loss` is comparable across stages
    and runs; the loss on the key is `eval_sftkey/key_nll`.

    In addition to SFTTrainer's metrics and `nll` (of the tokens in the loss), logs `sftkey/stage` (from 1),
    `sftkey/key_nll` and `sftkey/other_nll` (nats per token; the latter only if other tokens are in the loss), and
    `sftkey/key_fraction` (share of the key in all tokens that have a label in a `"full"` stage). With
    `answer_eval_steps`, also logs `sftkey/accuracy`, `sftkey/format_rate` and `sftkey/score` of generated answers. If
    there are several evaluation sets, each has its name as a prefix: `<name>_sftkey/accuracy`.

    Tokenized data may include its own column `key_mask`, which is 1 on each token of the key and 0 on all others.

    Example:

    ```python
    from datasets import load_dataset
    from hf_sft_variants import SFTKeyConfig, SFTKeyTrainer

    trainer = SFTKeyTrainer(
        "Qwen/Qwen2.5-0.5B",
        args=SFTKeyConfig("Qwen2.5-0.5B-SFTKey", key_pattern=r"####(?P<key>.+)", num_train_epochs=2),
        train_dataset=load_dataset("openai/gsm8k", "main", split="train").rename_columns(
            {"question": "prompt", "answer": "completion"}
        ),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "sftkey", "hf_sft_variants"]
    _name = "SFTKey"
    _paper = {
        "title": "Rethinking Supervised Fine-Tuning: Emphasizing Key Answer Tokens for Improved LLM Accuracy",
        "id": "2512.21017",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{sftkey2025,
                title  = {{Rethinking Supervised Fine-Tuning: Emphasizing Key Answer Tokens for Improved LLM
                          Accuracy}},
                author = {Xiaofeng Shi and Qian Kou and Yuduo Li and Hua Zhou},
                year   = 2025,
                eprint = {arXiv:2512.21017},
            }"""),
    }
    config_class = SFTKeyConfig
    annotation_columns = {"key_mask": KeyMask.NO_LABEL}
    _columns_of_the_user = frozenset({"key_mask"})

    @wraps(AnnotatedSFTTrainer.__init__)  # type: ignore[misc]  # mypy: a decorated constructor
    def __init__(self, *args, **kwargs):
        arguments = self.bind_arguments(*args, **kwargs)
        config, train_dataset = arguments["args"], arguments.get("train_dataset")
        if config.reasoning_column is not None and config.completion_only_loss is None and train_dataset is not None:
            config = copy(config)  # `SFTTrainer` would look for a `completion` that does not exist yet
            config.completion_only_loss = "prompt" in get_dataset_column_names(train_dataset)
        super().__init__(**{**arguments, "args": config})
        self._refuse_other_schedulers()
        self.add_missing_callback(StageSwitchCallback())
        if config.answer_eval_steps is not None:
            self.add_missing_callback(self._answer_accuracy_callback(arguments.get("eval_dataset")))

    def _refuse_other_schedulers(self):
        if self._has_stages and self.lr_scheduler is not None:
            raise InputError(
                "`optimizers` includes a learning-rate scheduler, but each stage has its own. Pass `optimizers="
                "(optimizer, None)` and set `lr_scheduler_type`."
            )
        deepspeed_plugin = self.accelerator.state.deepspeed_plugin
        if self._has_stages and deepspeed_plugin is not None and deepspeed_plugin.deepspeed_config.get("scheduler"):
            raise InputError(
                "The DeepSpeed configuration has a `scheduler`, but each stage has its own. Remove it and set "
                "`lr_scheduler_type`."
            )

    def _answer_accuracy_callback(self, eval_dataset):
        args = self.args
        if isinstance(eval_dataset, dict) and eval_dataset:
            dataset = {name: self._prompts_and_answers(rows, name) for name, rows in eval_dataset.items()}
        else:
            dataset = self._prompts_and_answers(eval_dataset, "eval")
        return AnswerAccuracyCallback(
            self,
            dataset,
            steps=args.answer_eval_steps,
            max_new_tokens=args.answer_eval_max_new_tokens,
            batch_size=args.per_device_eval_batch_size,
            num_samples=args.answer_eval_samples,
            thinking_tags=args.thinking_tags,
            answer_tags=args.answer_tags,
        )

    def _prompts_and_answers(self, rows, dataset_name):
        column = self.args.answer_column or "answer"
        columns = [] if rows is None else get_dataset_column_names(rows)
        if not isinstance(rows, Dataset) or not {"prompt", column} <= set(columns):
            raise InputError(
                f"`answer_eval_steps={self.args.answer_eval_steps}` needs an `eval_dataset` (in a recipe: "
                f"`eval_strategy`) that is not a stream and has the columns `prompt` and `{column}`; found "
                f"{columns or 'no columns'} in the {dataset_name} dataset."
            )
        return rows.select_columns(["prompt", column]).rename_columns({column: "answer"})

    # Annotation: finding the key

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if self.args.reasoning_column is not None:
            dataset = tag_responses(dataset, self.args, dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def annotation_settings(self, columns: list[str], is_packed: bool) -> dict[str, Any]:
        names = (
            "thinking_tags", "answer_tags", "key_delimiter", "key_pattern", "reasoning_column", "answer_column",
            "key_turns", "key_tags_in_loss",
        )  # fmt: skip
        # If no keys are needed, examples whose key is missing or cut off are kept
        stages = "with keys" if self.args.needs_keys else "without keys"
        return {"stages": stages, **{name: getattr(self.args, name) for name in names}}

    def annotate_untruncated(
        self, dataset: Dataset | IterableDataset, dataset_name: str, from_text: bool
    ) -> Dataset | IterableDataset:
        args = self.args
        fn_kwargs = {
            "find_key": KeyFinder(
                tuple(args.thinking_tags),
                tuple(args.answer_tags),
                args.key_delimiter,
                args.key_pattern,
                args.key_tags_in_loss,
                args.key_turns,
            ),
            "tokenizer": self._tokenizer,
            "chat_template": self.chat_template,
            "text_field": args.dataset_text_field,
            "has_text": from_text,
            "on_missing": args.missing_key if args.needs_keys else "ignore",
            "dataset_name": dataset_name,
        }
        map_kwargs = map_description(dataset, args, f"Finding keys of {dataset_name} dataset")
        return dataset.map(add_key_mask, batched=True, with_indices=True, fn_kwargs=fn_kwargs, **map_kwargs)

    def annotate(self, dataset: Dataset | IterableDataset, dataset_name: str) -> Dataset | IterableDataset:
        if not self.args.needs_keys:
            return dataset
        map_kwargs = map_description(dataset, self.args, f"Dropping keyless examples from {dataset_name} dataset")
        with global_then_local_main_first():
            kept = dataset.filter(has_whole_key, **map_kwargs)
        if not isinstance(dataset, Dataset):
            logger.warning(
                f"The {dataset_name} dataset is a stream: examples whose key is cut off by `max_length` or, with "
                "`missing_key='drop'`, missing are dropped as they arrive and not counted."
            )
            return kept
        if len(kept) < len(dataset):
            missing = sum(count < 0 for count in dataset["num_key_tokens"])
            logger.warning(
                f"Dropped {len(dataset) - len(kept)} of {len(dataset)} examples of the {dataset_name} dataset: "
                f"{missing} without a key or with several, {len(dataset) - len(kept) - missing} with a key that is "
                f"cut off by max_length={self.args.max_length}."
            )
        if len(kept) == 0:
            raise InputError(
                f"No example of the {dataset_name} dataset has a key within max_length={self.args.max_length}. Check "
                "`max_length` and the settings that locate the key."
            )
        return kept

    # Stages

    @property
    def _has_stages(self):
        return len(self.args.stages) > 1 or self.args.stage_learning_rates is not None

    @property
    def current_stage(self) -> int:
        """Index, from 0, of the stage that the next optimizer step belongs to."""
        if self.state.max_steps <= 0:  # not training yet
            return 0
        return stage_at(self.state.global_step, self.args.stage_fractions, self.state.max_steps)

    def create_scheduler(self, num_training_steps, optimizer=None):
        if not self._has_stages or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = staged_scheduler(optimizer or self.optimizer, self.args, num_training_steps)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # Done before tokens are counted, so the LM head skips the other tokens just as TRL's skips ignored ones
        if self.args.stages[self.current_stage] == KEY and self.args.full_loss_weight == 0:
            epoch_iterator = map(keep_key_labels, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # Loss

    def count_items(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor | int]:
        supervised = inputs["labels"][:, 1:] != -100
        on_key = supervised & (inputs["key_mask"][:, 1:] == KeyMask.KEY)
        counts = {"key_tokens": on_key.sum()}
        if self.args.key_loss_weight is not None:
            counts["weighted_tokens"] = (supervised & ~on_key).sum() + self.args.key_loss_weight * on_key.sum()
        return counts

    def compute_annotated_loss(self, batch: AnnotatedBatch) -> torch.Tensor:
        args, key_mask, nll = self.args, batch.annotations["key_mask"], -batch.log_probs
        on_key = (key_mask == KeyMask.KEY) & batch.label_mask
        self._add_metrics(batch, on_key)
        # Evaluation ignores the stages, so that its losses are comparable throughout the run
        stage = args.stages[self.current_stage] if self.model.training else FULL
        if stage == KEY:
            key_loss = (nll * on_key).sum() / batch.num_items["key_tokens"]
            if args.full_loss_weight == 0:
                return key_loss
            return key_loss + args.full_loss_weight * nll.sum() / batch.num_items["tokens"]
        if args.key_loss_weight is not None and self.model.training:
            weights = torch.where(on_key, args.key_loss_weight, 1.0)
            return (weights * nll).sum() / batch.num_items["weighted_tokens"]
        return nll.sum() / batch.num_items["tokens"]

    def _add_metrics(self, batch, on_key):
        nll = -batch.log_probs.detach()
        other = batch.label_mask & ~on_key
        labelled = (batch.annotations["key_mask"] != KeyMask.NO_LABEL).sum()
        batch.metrics["sftkey/key_nll"] = ((nll * on_key).sum(), on_key.sum())
        batch.metrics["sftkey/other_nll"] = ((nll * other).sum(), other.sum())
        batch.metrics["sftkey/key_fraction"] = (on_key.sum(), labelled)
        if self.model.training:
            batch.metrics["sftkey/stage"] = (self.current_stage + 1, 1)


def keep_key_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    """Remove the labels of all tokens outside the key from a collated batch."""
    return {**inputs, "labels": inputs["labels"].masked_fill(inputs["key_mask"] != KeyMask.KEY, -100)}
