import inspect
from collections.abc import Mapping
from copy import copy
from functools import partial, wraps
from typing import Any

import torch
from accelerate.utils import is_peft_model, send_to_device
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..lm_head.forward import add_lm_head
from . import batch as batches
from .batch import ROW_IDS, AnnotatedBatch, NumItems, make_annotated_batch
from .checkpoints import ResumeCheckMixin
from .collator import AnnotationCollator
from .metrics import MetricSumsMixin
from .model_card import ModelCardMixin
from .preparation import pack, require_supervised_token, truncate
from .prepared_sets import PreparedSetsMixin, add_made_with, is_packed, require_as_first_row
from .row_checks import check_rows, checked_text, refuse_token_columns, require_row
from .sources import MetricsBySourceMixin
from .trl_internals import get_dataset_column_names, global_then_local_main_first, leave_out_of_push
from .validation import refuse_unsupported, refuse_what_was_loaded, resolve_args


# Carries the step's counts with each micro-batch, so that a loss can't meet the counts of another step
_NUM_ITEMS = "num_items_in_step"


class AnnotatedSFTTrainer(
    ModelCardMixin, PreparedSetsMixin, MetricsBySourceMixin, MetricSumsMixin, ResumeCheckMixin, SFTTrainer
):
    """
    [`~trl.SFTTrainer`] whose loss may use what is known about each token.

    A method adds per-token columns to the prepared data set and computes its loss from them and from the tokens'
    log-probabilities. Tokenization, truncation, packing, evaluation, accumulation, several processes and PEFT stay
    TRL's. Takes the arguments of [`~trl.SFTTrainer`] and, without a subclass, computes its loss. Every loss is logged
    with `nll`, the plain mean negative log-likelihood per token.

    A subclass may set or override, and needs nothing else:

    - **config_class** (`type`): [`~trl.SFTConfig`] subclass to use without `args`, and to turn a plain `SFTConfig` or
      `TrainingArguments` into.
    - **annotation_columns** (`dict[str, int | float]`): per-token columns and their values on padding. They are
      truncated, packed and collated with the tokens. A member of an `IntEnum` as value names the column's values in
      `hf-sft-variants inspect`.
    - [`annotate`]: adds the columns. [`annotate_untruncated`] does so before truncation.
    - [`annotation_settings`]: the settings they depend on, which a prepared data set keeps.
    - [`count_items`]: what is counted over an optimizer step.
    - [`compute_annotated_loss`]: the loss.

    Example:

    ```python
    from datasets import load_dataset
    from hf_sft_variants import AnnotatedSFTTrainer


    def add_position_weights(example):
        num_tokens = len(example["input_ids"])
        return {"token_weights": [(position + 1) / num_tokens for position in range(num_tokens)]}


    class LateTokensTrainer(AnnotatedSFTTrainer):
        \"\"\"Tokens late in an example weigh more.\"\"\"

        annotation_columns = {"token_weights": 0.0}

        def annotate(self, dataset, dataset_name):
            return dataset.map(add_position_weights)

        def compute_annotated_loss(self, batch):
            weights = batch.annotations["token_weights"]
            batch.metrics["late_tokens/mean_weight"] = ((weights * batch.label_mask).sum(), batch.label_mask.sum())
            return -(weights * batch.log_probs).sum() / batch.num_items["tokens"]


    trainer = LateTokensTrainer("Qwen/Qwen2.5-0.5B", train_dataset=load_dataset("trl-lib/Capybara", split="train"))
    ```

    Raises:
        `InputError`: For vision data sets, `loss_type="dft"`, `compute_loss_func`, label smoothing, context or
            sequence parallelism, and packed rows with prompt learning.
    """

    config_class: type[SFTConfig] = SFTConfig
    annotation_columns: dict[str, int | float] = {}

    @wraps(SFTTrainer.__init__)  # type: ignore[misc]  # mypy: a decorated constructor
    def __init__(self, *args, **kwargs):
        arguments = self.bind_arguments(*args, **kwargs)
        self.args = arguments["args"]  # `Trainer` sets it only after the data sets are prepared
        self._is_streaming = isinstance(arguments.get("train_dataset"), IterableDataset)
        refuse_unsupported(type(self).__name__, arguments)
        super().__init__(**arguments)
        refuse_what_was_loaded(self)
        add_lm_head(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        if self.token_columns or self.padding_free:
            self.data_collator = AnnotationCollator(self.data_collator, self.token_columns)

    @classmethod
    def bind_arguments(cls, *args, **kwargs) -> dict[str, Any]:
        """The arguments of `__init__` by name, with `args` as a `config_class`: for checks before data is prepared."""
        arguments = inspect.signature(SFTTrainer.__init__).bind(None, *args, **kwargs).arguments
        del arguments["self"]
        args = resolve_args(arguments.get("args"), cls.config_class, arguments["model"], cls._name)
        return {**arguments, "args": args}

    # What a method overrides

    def annotate_untruncated(
        self, dataset: Dataset | IterableDataset, dataset_name: str, from_text: bool
    ) -> Dataset | IterableDataset:
        """
        As [`annotate`], but before truncation, for columns that have to be found in whole examples; they are truncated
        with the tokens. Called by one process first; the others find its result in the cache. `from_text` says whether
        the rows came as text or messages, and not as tokens.
        """
        return dataset

    def annotate(self, dataset: Dataset | IterableDataset, dataset_name: str) -> Dataset | IterableDataset:
        """
        Add the columns of `annotation_columns`: lists with one number for each token of `input_ids`.

        Called by all processes at once, so that they can share the work of running a model. Put a slow `map` inside
        `PartialState().main_process_first()`, and the other processes find its result in the cache.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                Tokenized, labelled and truncated, but not packed: `input_ids`, `labels` (`-100` on tokens that are not
                in the loss) and the user's own columns. An annotation belongs to the token at its position, which is
                the label to predict; there is no shift. With `packing_strategy="bfd_split"` or `"wrapped"` examples
                are whole here and split later.
            dataset_name (`str`):
                `"train"`, `"eval"`, or the name of one of several evaluation sets. `"train"` comes first.
        """
        return dataset

    def count_items(self, inputs: dict[str, Any]) -> Mapping[str, torch.Tensor | int]:
        """
        Number of each kind of item in one collated micro-batch, as scalars; `"tokens"` is added by the trainer. The
        sums over the optimizer step, all processes included, arrive as `num_items` of [`AnnotatedBatch`].
        """
        return {"samples": batches.count_supervised_samples(inputs)}

    def compute_annotated_loss(self, batch: AnnotatedBatch) -> torch.Tensor:
        """
        This micro-batch's part of the loss: a sum over its tokens or samples, divided by the matching
        `batch.num_items`; a differentiable zero if there is nothing to learn. The trainer scales it for several
        processes and adds the mixture-of-experts auxiliary loss.
        """
        return -batch.log_probs.sum() / batch.num_items["tokens"]

    def add_missing_callback(self, callback: TrainerCallback) -> None:
        """Add a callback, unless the user has passed one of its class."""
        if not any(isinstance(other, type(callback)) for other in self.callback_handler.callbacks):
            self.add_callback(callback)

    # Data: annotations through preparation, truncation and packing

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """
        Check, tokenize (TRL), [`annotate_untruncated`], truncate, [`annotate`], pack, record the settings, shuffle.
        Sets that are packed and annotated already are only checked.
        """
        require_row(f"The {dataset_name} dataset", dataset)
        if isinstance(dataset, IterableDataset) or dataset.format["type"] != "custom":
            dataset = dataset.with_format(None)  # columns as lists, whatever the user looks at them with
        columns = set(get_dataset_column_names(dataset))
        from_text = "input_ids" not in columns
        made_with = self.check_prepared(dataset, packing, dataset_name)
        if made_with is not None and isinstance(dataset, IterableDataset):
            dataset = require_as_first_row(dataset, dataset_name)
        if is_packed(made_with) or {"input_ids", "seq_lengths", *self.token_columns} <= columns:
            # Packing it again would lose where its documents end
            dataset = check_rows(dataset, args, self._tokenizer, dataset_name)
            self.remember_examples(dataset, dataset_name)
            return dataset
        if from_text:
            refuse_token_columns(dataset, dataset_name)
        self.number_sources(dataset, dataset_name)
        if from_text and formatting_func is not None:
            formatting_func = partial(checked_text, formatting_func=formatting_func)
        else:
            with global_then_local_main_first():
                dataset = check_rows(dataset, args, self._tokenizer, dataset_name)
        # TRL truncates and packs only `input_ids` and `labels`, so here it only tokenizes and builds the labels
        tokenize_args = copy(args)
        tokenize_args.max_length = None
        tokenize_args.shuffle_dataset = False
        arguments = (dataset, processing_class, tokenize_args, False, formatting_func, dataset_name)
        dataset = super()._prepare_dataset(*arguments)
        with global_then_local_main_first():
            dataset = self.annotate_untruncated(dataset, dataset_name, from_text)
            dataset = truncate(dataset, self.annotation_columns, args, packing, dataset_name)
            require_supervised_token(dataset, dataset_name)
        dataset = self.annotate(dataset, dataset_name)
        with global_then_local_main_first():
            dataset = self.add_sources(dataset, dataset_name)
            columns = get_dataset_column_names(dataset)
            if packing:
                dataset = pack(dataset, list(self.token_columns), args, dataset_name)
            if self.token_columns:
                made_with = self.describe_annotations(columns, packing, packing, made_with)
                made_with |= self.describe_sources()
                dataset = add_made_with(dataset, made_with, args, dataset_name)
        dataset = dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
        self.remember_examples(dataset, dataset_name)
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        new_columns = [name for name in self.token_columns if name not in self._signature_columns]
        self._signature_columns = self._signature_columns + new_columns

    def _reject_skip_prepare_without_labels(self, datasets, data_collator):
        # TRL looks at the collator's type, which `evaluate` finds wrapped
        super()._reject_skip_prepare_without_labels(datasets, getattr(data_collator, "collator", data_collator))
        if self._skip_prepare_dataset:
            for name, dataset in datasets.items():
                self.check_prepared(dataset, self._packs(name), name)

    def _prepare_inputs(self, inputs):
        # DeepSpeed casts every floating-point input to the model's dtype; annotations and counts keep theirs
        kept = {name: inputs[name] for name in (*self.token_columns, _NUM_ITEMS) if name in inputs}
        return {**super()._prepare_inputs(inputs), **send_to_device(kept, self.args.device)}

    # The Hub

    def not_pushed(self) -> list[str]:
        """Patterns of the files in `output_dir` that are not pushed to the Hub."""
        return ["*.lock"]

    def push_to_hub(self, *args, **kwargs):
        """As [`~transformers.Trainer.push_to_hub`], without what [`not_pushed`] names."""
        with leave_out_of_push(self.not_pushed()):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder):
        with leave_out_of_push(self.not_pushed()):
            super()._push_from_checkpoint(checkpoint_folder)

    # Loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batch_samples, num_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if num_tokens is not None:
            num_items = batches.count_step_items(map(self.count_items, batch_samples), self, device)
            batch_samples = [{**inputs, _NUM_ITEMS: num_items} for inputs in batch_samples]
        return batch_samples, num_tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)  # the caller's stays as it is
        step_items = inputs.pop(_NUM_ITEMS, None)
        row_ids = inputs.pop(ROW_IDS, None)
        annotations = {name: inputs.pop(name) for name in self.token_columns}
        outputs = model(**inputs, score_labels=True)
        if num_items_in_batch is None:  # evaluation, or a caller's own loop: the micro-batch counts for itself
            num_items = NumItems(self.count_items({**inputs, **annotations}), tokens=outputs.label_mask.sum())
        else:
            num_items = NumItems(step_items or {}, tokens=torch.as_tensor(num_items_in_batch))
        batch = make_annotated_batch(inputs, outputs, annotations, self.token_columns, num_items)
        loss = self.compute_annotated_loss(batch)
        # As in SFTTrainer: the counts are global and DDP averages the gradients over the processes
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if outputs.aux_loss is not None:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps

        self.sum_metrics(batch, row_ids)
        self.log_as_sft_trainer(inputs, outputs)
        if not return_outputs:
            return loss
        with torch.no_grad():  # the logits, for `compute_metrics`
            return loss, model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
