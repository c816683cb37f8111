import textwrap
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import set_seed

from ..base import AnnotatedBatch, AnnotatedSFTTrainer
from ..base.batch import at_least_float32
from ..base.checkpoints import last_checkpoint
from ..base.example_keys import EXAMPLE_KEY, add_content_keys
from ..base.preparation import map_description
from ..base.processes import on_main_process
from ..base.trl_internals import get_dataset_column_names, global_then_local_main_first
from ..errors import InputError
from .confidence_file import halves_from_file, require_unique_keys
from .config import SFTMixConfig
from .mixing import documents_of, draw_pairs, mixup_inputs
from .online import OnlineConfidence
from .pairing import CONFIDENT, NEITHER, UNCONFIDENT, PairSampler, random_halves
from .reference_phase import ReferencePhase, not_pushed, reference_folder


logger = get_logger(__name__)


class SFTMixTrainer(AnnotatedSFTTrainer):
    r"""
    Trainer for SFTMix: supervised fine-tuning with mixup between confident and unconfident examples.

    A reference model is trained on the same data first, and its confidence splits the examples into two halves. Every
    micro-batch holds pairs of a confident and an unconfident example, drawn anew each epoch, whose last hidden states
    \\( z \\) and labels \\( y \\) are mixed, label by label up to the end of the shorter example. The rest of the
    longer one, and examples without a partner, have next-token loss only:

    $$ L = L_\text{NTP} + \mu \, \text{CE}(\text{head}(\lambda z^c + (1-\lambda) z^u), \; \lambda y^c +
    (1-\lambda) y^u), \quad \lambda \sim \text{Beta}(\alpha, \alpha) $$

    Takes the arguments of [`~trl.SFTTrainer`] and differs from it in the loss and in the order of the examples.
    Evaluation reports the next-token loss.

    References:
        - [SFTMix](https://huggingface.co/papers/2410.05248). No official code is known. The paper does not say when
          the reference is evaluated, nor how the mixup loss is reduced: we take the mean over the mixed positions of
          the optimizer step. λ is drawn for each pair at each step, from the seed, the step and the pair's numbers, so
          it does not depend on resuming, the number of processes or the accumulation.

    Requirements:
        1. A map-style training set of at least two examples; streams with `confidence_split="random"` only.
        2. Training by `train()`, which trains the reference. In a loop of your own, use `confidence_source="file"`.

    Logs, in addition to SFTTrainer's metrics and `nll`:
        - `sftmix/mixup_loss` (nats per mixed position), `sftmix/mean_lambda` (over the mixed positions) and
          `sftmix/mixed_fraction` (share of the labels that are mixed);
        - `sftmix/confident_nll` and `sftmix/unconfident_nll` of the tokens of each half.

    Relations:
        - With `mixup_weight=0` and `pair_sampling=False`, [`~trl.SFTTrainer`]. Mixing takes no more products with the
          LM head than its step, and with LoRA fewer ([`~hf_sft_variants.lm_head.label_log_probs`]).

    Attributes:
        halves (`torch.Tensor` of shape `(num_examples,)`):
            Half of each training example: 1 confident, 0 unconfident, -1 neither, or not known yet.
        train_examples ([`~datasets.Dataset`]):
            The prepared training examples, before packing and shuffling: an example's number is its row here.

    Example:

    ```python
    from datasets import load_dataset
    from hf_sft_variants import SFTMixConfig, SFTMixTrainer

    trainer = SFTMixTrainer(
        "Qwen/Qwen2.5-0.5B",
        args=SFTMixConfig("Qwen2.5-0.5B-SFTMix", num_train_epochs=3),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()  # the reference, then mixup; `train(resume_from_checkpoint=True)` resumes either
    ```

    Raises:
        `InputError`: For fewer than two examples, a stream with a confidence split, a confidence file of other data,
            or a training set that is packed already.
    """

    _tag_names = ["trl", "sft", "sftmix", "hf_sft_variants"]
    _name = "SFTMix"
    _paper = {
        "title": "SFTMix: Elevating Language Model Instruction Tuning with Mixup Recipe",
        "id": "2410.05248",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{sftmix2024,
                title  = {{SFTMix: Elevating Language Model Instruction Tuning with Mixup Recipe}},
                author = {Yuxin Xiao and Shujian Zhang and Wenxuan Zhou and Marzyeh Ghassemi and Sanqiang Zhao},
                year   = 2024,
                eprint = {arXiv:2410.05248},
            }"""),
    }
    config_class = SFTMixConfig
    halves: torch.Tensor | None = None
    train_examples: Dataset | None = None
    example_keys: list[str] | None = None
    _online: OnlineConfidence | None = None

    @wraps(AnnotatedSFTTrainer.__init__)  # type: ignore[misc]  # mypy: a decorated constructor
    def __init__(self, *args, **kwargs):
        arguments = self.bind_arguments(*args, **kwargs)
        config, train_dataset = arguments["args"], arguments.get("train_dataset")
        self._has_numbers = config.numbers_examples and not isinstance(train_dataset, IterableDataset)
        self._refuse_train_dataset(config, train_dataset)
        self._reference_phase = ReferencePhase(arguments)
        super().__init__(**arguments)
        if self._has_numbers:
            self.halves = self._halves_at_the_start(self.train_examples)
        if config.needs_reference:
            self._reference_phase.check(self)
        if config.needs_confidence and config.confidence_source == "online":
            self._online = OnlineConfidence(self)
            self.add_callback(self._online)

    def _refuse_train_dataset(self, config, train_dataset):
        if isinstance(train_dataset, IterableDataset) and config.needs_confidence:
            raise InputError(
                "`confidence_split='confidence'` needs all examples before training, but `train_dataset` is a stream. "
                "Load it without streaming, or set `confidence_split='random'`."
            )
        is_map_style = isinstance(train_dataset, Dataset)  # SFTTrainer refuses anything else
        if is_map_style and self._has_numbers and "seq_lengths" in get_dataset_column_names(train_dataset):
            raise InputError(
                "`train_dataset` is packed already (it has the column `seq_lengths`), so its examples have no numbers "
                "that pairs go by. Give the rows before packing."
            )

    # Data: every example has a number, by which its half is looked up; without one, pairs are drawn in the micro-batch

    @property
    def annotation_columns(self) -> dict[str, int | float]:  # type: ignore[override]  # an attribute of the base
        return {"example_number": NEITHER} if self._has_numbers else {}

    def annotate_untruncated(
        self, dataset: Dataset | IterableDataset, dataset_name: str, from_text: bool
    ) -> Dataset | IterableDataset:
        if self.args.needs_confidence and dataset_name == "train" and self.example_keys is None:
            if EXAMPLE_KEY in dataset.column_names:
                require_unique_keys(dataset)
            else:
                options = {**self._text_options, "is_prepared": from_text}
                dataset = add_content_keys(dataset, self.args.dataset_num_proc, **options)
            self.example_keys = dataset[EXAMPLE_KEY][:]
        return dataset

    @property
    def _text_options(self) -> dict[str, Any]:
        return {"text_field": self.args.dataset_text_field, "eos_token": self._tokenizer.eos_token}

    def annotate(self, dataset: Dataset | IterableDataset, dataset_name: str) -> Dataset | IterableDataset:
        if not self._has_numbers:
            return dataset
        is_train = dataset_name == "train" and self.train_examples is None
        map_kwargs = map_description(dataset, self.args, f"Numbering examples of {dataset_name} dataset")
        with global_then_local_main_first():
            dataset = dataset.map(_number_example, with_indices=True, fn_kwargs={"is_train": is_train}, **map_kwargs)
        if is_train:
            self.train_examples = dataset
        return dataset

    def annotation_settings(self, columns: list[str], is_packed: bool) -> dict[str, Any]:
        return {}  # an example's number depends on nothing, and is given anew

    def _halves_at_the_start(self, examples: Dataset) -> torch.Tensor:
        args, num_examples = self.args, len(examples)
        num_with_labels = sum(number > 0 for number in examples["num_labels"])
        if num_with_labels < 2:
            raise InputError(
                f"{num_with_labels} example of the train dataset has labels, but a pair takes two. Add examples."
            )
        if num_with_labels % 2:
            logger.warning(
                f"{num_with_labels} examples with labels make no equal halves: one of them has no partner, and is "
                "trained on without mixup."
            )
        if not args.needs_confidence:
            return random_halves(num_examples, args.seed)
        if args.confidence_source == "file":
            measure = args.confidence_measure
            return halves_from_file(args.confidence_file, examples, measure, **self._text_options)
        return torch.full((num_examples,), NEITHER, dtype=torch.int8)

    # Pairs

    def _get_train_sampler(self, train_dataset=None):
        if not self._has_numbers or self.args.packing:
            return super()._get_train_sampler(train_dataset)
        return PairSampler(self)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.args.mixup_weight == 0:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batch_samples, num_tokens = super().get_batch_samples(
            map(self._with_pairs, epoch_iterator), num_batches, device
        )
        weights = [weight for inputs in batch_samples for weight in inputs["mixup_weights"]]
        mean_lambda = {"sftmix/mean_lambda": (sum(weights), len(weights))}
        self._metric_sums.add("train", mean_lambda, self.accelerator)
        return batch_samples, num_tokens

    def _with_pairs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        args, step = self.args, self.state.global_step
        # Documents of a packed row are always together, so among them partners are drawn at random
        shuffle = args.packing and self.halves is not None
        pairs = draw_pairs(documents_of(inputs, self.halves), args.seed, step, shuffle)
        return {**inputs, **mixup_inputs(pairs, args.mixup_alpha, args.seed, step, inputs["labels"].device)}

    # Loss

    def count_items(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor | int]:
        return {"mixed_positions": len(inputs.get("mixup_weights", []))}

    def compute_annotated_loss(self, batch: AnnotatedBatch) -> torch.Tensor:
        ntp_loss = super().compute_annotated_loss(batch)
        if not self.model.training:
            return ntp_loss
        if self._online is not None:
            self._online.add(batch)
        if self._has_numbers:
            self._add_nll_of_halves(batch)
        loss = self.args.ntp_weight * ntp_loss
        mixed_log_probs = batch.outputs.mixed_log_probs
        if mixed_log_probs is None:
            return loss
        mixup_loss = -at_least_float32(mixed_log_probs).sum()
        batch.metrics["sftmix/mixup_loss"] = (mixup_loss.detach(), len(mixed_log_probs))
        batch.metrics["sftmix/mixed_fraction"] = (2 * len(mixed_log_probs), batch.label_mask.sum())
        return loss + self.args.mixup_weight * mixup_loss / batch.num_items["mixed_positions"]

    def _add_nll_of_halves(self, batch):
        nll, numbers = -batch.log_probs.detach(), batch.annotations["example_number"]
        halves = self.halves[numbers.cpu()].to(nll.device)
        for name, half in (("confident", CONFIDENT), ("unconfident", UNCONFIDENT)):
            in_half = (halves == half) & batch.label_mask
            batch.metrics[f"sftmix/{name}_nll"] = ((nll * in_half).sum(), in_half.sum())

    # The run: with a reference it has two phases

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """As [`AnnotatedSFTTrainer.train`]; `resume_from_checkpoint=True` resumes the phase that was stopped."""
        args = self.args
        is_begun = args.needs_reference and on_main_process(reference_folder(args).is_dir)
        checkpoint = None  # none, if the run was stopped in its first phase or between the two
        if resume_from_checkpoint is not True or not is_begun or last_checkpoint(args.output_dir) is not None:
            checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if args.needs_reference:
            path = self._reference_phase.run(self, bool(resume_from_checkpoint), checkpoint)
            measure = args.confidence_measure
            # Other machines may have no such file
            self.halves = on_main_process(
                partial(halves_from_file, path, self.train_examples, measure, skip_missing=True)
            )
            set_seed(args.seed)  # as if there had been no first phase
        return super().train(checkpoint, trial, ignore_keys_for_eval)

    def begin_run(self, checkpoint: str | None) -> None:
        super().begin_run(checkpoint)
        if self._online is not None and checkpoint is not None:
            self._online.load(checkpoint)

    def add_to_checkpoint(self, folder: Path) -> None:
        super().add_to_checkpoint(folder)
        if self._online is not None:
            self._online.save(folder)

    def not_pushed(self) -> list[str]:
        return [*super().not_pushed(), *not_pushed(self.args)]  # the reference; see `push_confidence`


def _number_example(example: dict[str, Any], row: int, is_train: bool) -> dict[str, Any]:
    """Number a training example by its row, on each token; examples for evaluation have no number."""
    number = row if is_train else NEITHER
    return {
        "example_number": [number] * len(example["input_ids"]),
        "example_row": row,
        "num_labels": sum(label != -100 for label in example["labels"][1:]),
    }
