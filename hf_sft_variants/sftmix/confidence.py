"""Measures how well a model predicts each training example at several checkpoints; `pairing.py` splits by it."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model, send_to_device
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import has_length
from trl import SFTTrainer

from ..base.example_keys import EXAMPLE_KEY, add_content_keys, keys_are_of
from ..base.processes import on_main_process
from ..base.trl_internals import DataCollatorForLanguageModeling, global_then_local_main_first
from ..errors import InputError
from ..evaluation.generation import evaluation_mode
from ..lm_head.forward import add_lm_head
from ..scoring.shards import plan_shards, write_parquet
from .confidence_file import confidence_table, require_unique_keys


logger = get_logger(__name__)


class ConfidenceTrackingCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] that evaluates the training data at checkpoints of a run and then ranks the
    examples by the model's confidence: the negative mean of their perplexities, as defined by
    [SFTMix](https://huggingface.co/papers/2410.05248). For [`~trl.SFTTrainer`] and its subclasses.

    The perplexity of an example is exp of the mean negative log-likelihood (NLL) of its labels, in float32, with the
    NLL clamped to 20. Evaluation runs without dropout and is divided among the processes. It does not affect training:
    it draws no random numbers and leaves weights and modes unchanged. (On some CPUs, however, bitsandbytes rounds the
    scales of a 4-bit model whenever it is evaluated.) The results of each checkpoint are written to
    `<output_file>.checkpoints` immediately, so that a resumed run can use them.

    The output file has one row per example, in the order of the training data:

    - **example_key** (string): a hash of the example's content, or the data set's own column of this name, whose
      values must be unique. Equal examples have the same hash and values.
    - **num_labels** (int64): number of labels. If there are none, all other columns are null.
    - **nll_<step>**, **perplexity_<step>** (double) for each checkpoint: after that optimizer step; NLL in nats.
    - **mean_nll**, **mean_perplexity** (double): over the checkpoints.
    - **rank** (int64): from 0, which is the most confident example.
    - **half** (string): `"confident"`, `"unconfident"`, or null for the middle example of an odd number.

    Its schema metadata contain JSON under the key `hf_sft_variants`: the `version` of the format, `measure`, `steps`,
    and `keys`, the source of the keys (`"text"`, `"tokens"` or `"column"`).

    Example:

    ```python
    from datasets import load_dataset
    from hf_sft_variants import ConfidenceTrackingCallback
    from trl import SFTTrainer

    trainer = SFTTrainer("Qwen/Qwen2.5-0.5B", train_dataset=load_dataset("trl-lib/Capybara", split="train"))
    trainer.add_callback(ConfidenceTrackingCallback(trainer, "confidence.parquet"))
    trainer.train()
    ```

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer to which the callback will be attached.
        output_file (`str` or `Path`):
            Parquet file, written by the main process.
        checkpoints (`Sequence[int]`, *optional*):
            Optimizer steps after which to evaluate. Defaults to the end of each epoch if there are three or more,
            otherwise to three evenly spaced steps, including the last one. The paper does not specify this.
        measure (`str`, *optional*, defaults to `"perplexity"`):
            What to rank by: the mean `"perplexity"` or `"mean_nll"`. Ties are broken by mean NLL, then by position.
        dataset ([`~datasets.Dataset`], *optional*):
            Prepared examples to evaluate, with `input_ids` and `labels`. Defaults to the training data, where packed
            rows are split into their documents, whose keys are hashes of tokens.

    Raises:
        `InputError`: When training starts: for streams, packing that cuts examples, tensor parallelism, or checkpoints
            after the last step, or if the resumed run has passed a checkpoint that was not evaluated. During training:
            if an example's NLL is NaN.
    """

    def __init__(
        self,
        trainer: SFTTrainer,
        output_file: str | Path,
        checkpoints: Sequence[int] | None = None,
        measure: str = "perplexity",
        dataset: Dataset | None = None,
    ):
        if measure not in ("perplexity", "mean_nll"):
            raise InputError(f"`measure={measure!r}` is unknown; choose one of ['perplexity', 'mean_nll'].")
        self.trainer = trainer
        self.output_file = Path(output_file)
        self.checkpoints = checkpoints
        self.measure = measure
        self.dataset = dataset
        add_lm_head(trainer.model.get_base_model() if is_peft_model(trainer.model) else trainer.model)

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        refuse_tensor_parallelism(self.trainer)
        steps_per_epoch = None  # unknown for a stream
        if has_length(train_dataloader):
            steps_per_epoch = max(math.ceil(len(train_dataloader) / args.gradient_accumulation_steps), 1)
        self._steps = checkpoint_steps(self.checkpoints, state.max_steps, steps_per_epoch)
        with global_then_local_main_first():
            self._examples, self._keys_of = self._keyed_examples(args)
            token_keys = add_content_keys(self._examples.remove_columns(EXAMPLE_KEY), args.dataset_num_proc)
        on_main_process(partial(self._check_parts, state.global_step))
        self._num_labels = np.array([sum(label != -100 for label in row[1:]) for row in self._examples["labels"]])
        # Equal examples are evaluated only once, because rounding would make their values differ between batches
        _, first, number = np.unique(token_keys[EXAMPLE_KEY][:], return_index=True, return_inverse=True)
        self._evaluated_row = first[number]
        rows, lengths = np.sort(first).tolist(), [len(ids) for ids in self._examples["input_ids"]]
        shards = plan_shards([lengths[row] for row in rows], args.per_device_eval_batch_size * max(lengths))
        self._batches = [[rows[number] for number in batch] for shard in shards for batch in shard]

    def _keyed_examples(self, args) -> tuple[Dataset, str]:
        """Return the examples with their keys, and the source of the keys."""
        examples = trained_examples(self.trainer) if self.dataset is None else self.dataset
        examples = examples.with_format(None)  # the user may have set another format
        if EXAMPLE_KEY in examples.column_names:
            keys_of = "column"
            if self.dataset is None:
                require_unique_keys(examples)
        else:
            keys_of = keys_are_of(examples.column_names, args.dataset_text_field, is_prepared=True)
            options = {"text_field": args.dataset_text_field, "eos_token": self.trainer._tokenizer.eos_token}
            examples = add_content_keys(examples, args.dataset_num_proc, **options, is_prepared=True)
        return examples.select_columns([EXAMPLE_KEY, "input_ids", "labels"]), keys_of

    def _part(self, step: int) -> Path:
        """File with the values of one checkpoint, kept so that the run can be resumed."""
        return self.output_file.with_name(f"{self.output_file.name}.checkpoints") / f"step-{step}.parquet"

    def _check_parts(self, global_step: int) -> None:
        """Remove the parts left by an earlier run or by steps lost in a crash, and check the remaining ones."""
        for part in self._part(0).parent.glob("step-*.parquet"):
            if int(part.stem.removeprefix("step-")) > global_step:
                part.unlink()
        for part in (self._part(step) for step in self._steps if step <= global_step):
            if not part.is_file():
                raise InputError(
                    f"The run was resumed at step {global_step}, but {part} is missing: the data was not evaluated at "
                    "that step. Start from the beginning, or resume from a checkpoint before that step."
                )
            if pq.read_table(part)[EXAMPLE_KEY].to_pylist() != self._examples[EXAMPLE_KEY][:]:
                raise InputError(
                    f"The examples in {part} differ from those of this run, or are in a different order. Resume with "
                    "the same data set, or start from the beginning."
                )

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self._steps:
            nll = self._evaluate(state.global_step)
            if state.is_world_process_zero:
                table = pa.table({EXAMPLE_KEY: self._examples[EXAMPLE_KEY][:], "nll": nll})
                write_parquet(table, self._part(state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        steps = [step for step in self._steps if step <= state.global_step]
        if not steps:
            logger.warning(f"Training ended before its first checkpoint, so {self.output_file} is not written.")
        elif state.is_world_process_zero:
            nll = {step: pq.read_table(self._part(step))["nll"].to_numpy() for step in steps}
            keys = self._examples[EXAMPLE_KEY][:]
            write_parquet(confidence_table(keys, self._num_labels, nll, self.measure, self._keys_of), self.output_file)
        self.trainer.accelerator.wait_for_everyone()

    def _evaluate(self, step: int) -> np.ndarray:
        """Mean NLL of each example's labels, or NaN without labels; identical on all processes."""
        accelerator, model = self.trainer.accelerator, self.trainer.model_wrapped
        num_processes = accelerator.num_processes
        found: list[tuple[int, float]] = []
        # All processes must run a sharded model the same number of times
        rounds = range(math.ceil(len(self._batches) / num_processes))
        hide_progress = not accelerator.is_main_process or self.trainer.args.disable_tqdm
        with evaluation_mode(model):
            for number in tqdm(rounds, desc=f"Confidence at step {step}", leave=False, disable=hide_progress):
                rows = self._batches[(number * num_processes + accelerator.process_index) % len(self._batches)]
                examples = [self._examples[row] for row in rows]
                found += zip(rows, _mean_nll(model, examples, accelerator.device), strict=True)
        nll = np.full(len(self._examples), np.nan)
        for row, value in gather_object(found):
            nll[row] = value
        nll = nll[self._evaluated_row]
        wrong = np.flatnonzero(np.isnan(nll) & (self._num_labels > 0))
        if len(wrong):
            raise InputError(
                f"The perplexity of row {wrong[0]} of the train dataset (key "
                f"{self._examples[EXAMPLE_KEY][int(wrong[0])]}) is NaN after step {step} (as in {len(wrong)} of "
                f"{len(nll)} rows). Training has diverged: lower `learning_rate`, or inspect the row."
            )
        return nll


def refuse_tensor_parallelism(trainer: SFTTrainer) -> None:
    """Refuse tensor parallelism, whose processes need the same examples, while evaluation gives each its own."""
    if (trainer.get_tp_size() or 1) > 1:
        raise InputError(
            "ConfidenceTrackingCallback gives each process different examples, which tensor parallelism does not "
            "allow. Train without tensor parallelism, or use `confidence_source='file'`."
        )


def _mean_nll(model, examples: list[dict], device: torch.device) -> list[float]:
    """Mean NLL of each example's labels, or NaN without labels."""
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(examples)  # padding is masked
    outputs = model(**send_to_device(batch, device), score_labels=True)
    # Counted here because, with the virtual tokens of prompt learning, the first token is predicted too
    return (-outputs.log_probs.float().cpu().double().sum(1) / outputs.label_mask.cpu().sum(1)).tolist()


def checkpoint_steps(wanted: Sequence[int] | None, max_steps: int, steps_per_epoch: int | None) -> list[int]:
    """
    Optimizer steps after which a run evaluates its data, each time with a forward pass over all of it: those `wanted`
    or, by default, the end of each epoch. With fewer than three epochs, or for a stream (`steps_per_epoch=None`), the
    default is three evenly spaced steps. Raises an `InputError` if `wanted` is empty or has a step outside the run.
    """
    if wanted is not None:
        steps = sorted(set(wanted))
        if not steps or not all(isinstance(step, int) for step in steps) or steps[0] < 1 or steps[-1] > max_steps:
            raise InputError(f"The confidence checkpoints {steps} must be steps of the run, from 1 to {max_steps}.")
        return steps
    if steps_per_epoch and max_steps >= 3 * steps_per_epoch:
        return sorted({*range(steps_per_epoch, max_steps, steps_per_epoch), max_steps})
    return sorted({max(round(max_steps * part / 3), 1) for part in (1, 2, 3)})


def trained_examples(trainer: SFTTrainer) -> Dataset:
    """Return a trainer's training examples, one per row. Refuses streams, and packing that cuts examples."""
    dataset = trainer.train_dataset
    if not isinstance(dataset, Dataset):
        raise InputError("`train_dataset` is a stream, so its examples can't be ranked. Load it without streaming.")
    if not trainer.args.packing:
        return dataset
    if trainer.args.packing_strategy != "bfd":
        raise InputError(
            f"`packing_strategy={trainer.args.packing_strategy!r}` cuts examples, so they can't be ranked. Use 'bfd', "
            "or pass the unpacked `dataset` to ConfidenceTrackingCallback."
        )
    return dataset.map(_cut_into_documents, batched=True, remove_columns=dataset.column_names, desc="Unpacking")


def _cut_into_documents(rows: dict[str, list]) -> dict[str, list]:
    documents: dict[str, list] = {"input_ids": [], "labels": []}
    for number, lengths in enumerate(rows["seq_lengths"]):
        for name, values in documents.items():
            values += np.split(rows[name][number], np.cumsum(lengths)[:-1])
    return documents
