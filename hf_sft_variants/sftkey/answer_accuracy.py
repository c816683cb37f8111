"""Accuracy of the answers that a model generates for held-out prompts during training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainerCallback

from ..errors import InputError
from ..evaluation import tagged_scores
from ..evaluation.generation import evaluation_mode, generate_answers
from ..evaluation.tagged_answers import ANSWER_TAGS, THINKING_TAGS, check_tags


class AnswerAccuracyCallback(TrainerCallback):
    r"""
    A [`~transformers.TrainerCallback`] that generates answers to held-out prompts every few steps and after the last
    one, and logs `sftkey/accuracy`, `sftkey/format_rate` and `sftkey/score` (0.7 · accuracy + 0.3 · format rate).

    Decoding is greedy, and the processes share the prompts. The callback does not affect the run: it draws no random
    numbers, and leaves weights, modes and other logged metrics unchanged.

    Usage:
    ```python
    >>> trainer = SFTKeyTrainer(...)
    >>> trainer.add_callback(AnswerAccuracyCallback(trainer, held_out_rows, steps=100))
    ```

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer to which the callback will be attached, an [`~trl.SFTTrainer`] or subclass.
        dataset (`Dataset` or `dict[str, Dataset]`):
            Raw rows with `prompt`, a conversation or a text, and the string `answer`. Several data sets are logged
            under their names, as `<name>_sftkey/accuracy` and so on.
        steps (`int`):
            Number of optimizer steps between two reports.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum length of a generated answer in tokens.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of prompts that a process answers at once.
        num_samples (`int`, *optional*):
            Number of rows to use of each data set, from the start. By default all.
        thinking_tags (`Sequence[str]`, *optional*, defaults to `("<Thinking>", "</Thinking>")`):
            Opening and closing tags of the reasoning.
        answer_tags (`Sequence[str]`, *optional*, defaults to `("<Answer>", "</Answer>")`):
            Opening and closing tags of the answer. Without tags, an answer is found after `####`, in `\boxed{}` or
            after "the answer is" ([`~hf_sft_variants.evaluation.tagged_answers.extract_tagged_answer`]), but the
            format rate and the score are then meaningless.

    Raises:
        InputError: If a data set is empty, a stream or lacks a column or an answer, a number is below 1, or the tags
            are not pairs of strings. When training starts, with tensor parallelism.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset | dict[str, Dataset],
        steps: int,
        max_new_tokens: int = 256,
        batch_size: int = 16,
        num_samples: int | None = None,
        thinking_tags: Sequence[str] = THINKING_TAGS,
        answer_tags: Sequence[str] = ANSWER_TAGS,
    ):
        numbers = {"steps": steps, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        for name, number in {**numbers, "num_samples": num_samples}.items():
            if number is not None and number < 1:
                raise InputError(f"`{name}` must be an integer of 1 or more, got {number}.")
        check_tags(thinking_tags, answer_tags)
        self.trainer = trainer
        # By the prefix of the metrics' names, as for the trainer's evaluation sets
        if isinstance(dataset, dict):
            sets = {f"{name}_": (rows, f"`dataset[{name!r}]`") for name, rows in dataset.items()}
        else:
            sets = {"": (dataset, "`dataset`")}
        self.rows = {prefix: _prompts_and_answers(*rows, num_samples) for prefix, rows in sets.items()}
        self.steps = steps
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.tags = (thinking_tags, answer_tags)
        self._last_step = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._last_step = None
        if (self.trainer.get_tp_size() or 1) > 1:
            raise InputError(
                "AnswerAccuracyCallback gives each process other prompts, which tensor parallelism does not allow. "
                "Leave it out (`answer_eval_steps`), and run `hf-sft-variants evaluate` afterwards."
            )

    def on_step_end(self, args, state, control, **kwargs):
        # The last step is reported here, because trackers have closed their logs in `on_train_end`
        if state.global_step % self.steps == 0 or control.should_training_stop:
            self._measure(state, control)

    def on_train_end(self, args, state, control, **kwargs):
        self._measure(state, control)  # training was stopped between two steps, e.g. by an evaluation

    def _measure(self, state, control) -> None:
        if state.global_step == self._last_step:
            return
        self._last_step = state.global_step
        logs = {}
        for prefix, (prompts, answers) in self.rows.items():
            scores = tagged_scores(self._generate(prompts), answers, *self.tags)
            logs |= {f"{prefix}sftkey/{name}": value for name, value in scores.items()}
        should_log = control.should_log
        # In training mode `SFTTrainer.log` would add the training metrics since the last log to this entry
        with evaluation_mode(self.trainer.model):
            self.trainer.log(logs)
        control.should_log = should_log  # reset by `log`, which would suppress the training loss of this step

    def _generate(self, prompts: list) -> list[str]:
        """Answers to all prompts, the same list on every process."""
        accelerator = self.trainer.accelerator
        # Padded, because all processes of a sharded model have to generate the same number of batches
        with (
            accelerator.split_between_processes(list(range(len(prompts))), apply_padding=True) as rows,
            self._whole_model() as model,
        ):
            texts = generate_answers(
                model,
                self.trainer.processing_class,
                [prompts[i] for i in rows],
                self.max_new_tokens,
                self.batch_size,
                device=accelerator.device,
                show_progress=accelerator.is_main_process and not self.trainer.args.disable_tqdm,
            )
        text_of = dict(gather_object(list(zip(rows, texts, strict=True))))
        return [text_of[i] for i in range(len(prompts))]

    @contextmanager
    def _whole_model(self) -> Iterator[torch.nn.Module]:
        """
        The unwrapped model, ready to generate, as in `Seq2SeqTrainer`: FSDP1 leaves the root's weights flat, while
        FSDP2 and ZeRO-3 gather the weights of each layer when it is called.

        TRL's `unwrap_model_for_generation` would turn activation checkpointing off, and on again with other settings
        than the run's; in evaluation mode it is off anyway.
        """
        wrapped = self.trainer.model_wrapped
        model = self.trainer.accelerator.unwrap_model(wrapped, keep_torch_compile=False)
        if isinstance(wrapped, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(wrapped, recurse=False, writeback=False):
                yield model
        else:
            yield model


def _prompts_and_answers(dataset: Dataset, name: str, num_samples: int | None) -> tuple[list, list]:
    if not isinstance(dataset, Dataset):
        raise InputError(f"{name} must be a `datasets.Dataset` and not a stream, got {type(dataset).__name__}.")
    missing = [column for column in ("prompt", "answer") if column not in dataset.column_names]
    if missing:
        raise InputError(
            f"{name} has no column {', '.join(map(repr, missing))}, only "
            f"{', '.join(map(repr, dataset.column_names))}: rename or add what is missing."
        )
    if len(dataset) == 0:
        raise InputError(f"{name} is empty: pass at least one row.")
    prompts, answers = dataset["prompt"][:num_samples], dataset["answer"][:]
    if None in answers:
        raise InputError(f"{name}: `answer` of row {answers.index(None)} is None. Fill it in or drop the row.")
    return prompts, answers[:num_samples]
