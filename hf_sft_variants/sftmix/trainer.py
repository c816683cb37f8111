import inspect
import textwrap
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
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
from .mixing import draw_mixup
from .online import OnlineConfidence
from .pairing import (
    CONFIDENT,
    NEITHER,
    UNCONFIDENT,
    BeginEpochCallback,
    PairSampler,
    check_number,
    number_example,
    random_halves,
)
from .reference_phase import ReferencePhase, not_pushed, reference_folder


class SFTMixTrainer(AnnotatedSFTTrainer):
    r"""
    Trainer for SFTMix: supervised fine-tuning with mixup between confident and unconfident examples.

    A reference model that is trained on the same data first says which half of the examples it is confident of. Every
    micro-batch holds pairs of a confident and an unconfident example, drawn anew each epoch, whose last hidden states
    \\( z \\) and labels \\( y \\) are mixed, label by label up to the shorter example's end; the longer one's rest and
    examples without a partner have next-token loss only:

    $$ L = L_\text{NTP} + \mu \, \text{CE}(\text{head}(\lambda z^c + (1-\lambda) z^u), \; \lambda y^c +
    (1-\lambda) y^u), \quad \lambda \sim \text{Beta}(\alpha, \alpha) $$

    Differs from [`~trl.SFTTrainer`] in the loss and in the order of the examples, and takes the same arguments. Mixing
    takes no more products with the LM head than SFTTrainer's step, and with LoRA fewer
    ([`~hf_sft_variants.lm_head.label_log_probs`]). Method:
    [SFTMix](https://huggingface.co/papers/2410.05248). No official code is known. The paper does not say when the
    reference is evaluated, nor how the mixup loss is reduced; ours is the mean over the mixed positions of the
    optimizer step. λ is drawn for each pair at each step, from the seed, the step and the pair's numbers, so a resumed
    run, other numbers of processes and other accumulation mix the same.

    Evaluation reports the next-token loss. A reference is trained by `train()` alone: in a loop of your own, use
    `confidence_source="file"`.

    Logs beside SFTTrainer's metrics and `nll`: `sftmix/mixup_loss` (nats per mixed position), `sftmix/mean_lambda`
    (over the mixed positions), `sftmix/mixed_fraction` (share of the labels that are mixed), and of the tokens of each
    half `sftmix/confident_nll` and `sftmix/unconfident_nll`.

    Attributes:
        halves (`torch.Tensor` of shape `(num_examples,)`):
            Half of each training example: 1 confident, 0 unconfident, -1 neither (as long as none is known, too).
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
    trainer.train()  # the reference, then mixup; `train(resume_from_checkpoint=True)` goes on in either
    ```

    Raises:
        `InputError`: For fewer than two examples; with a confidence split for streams; for a file of other data.
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
    _pair_sampler: PairSampler | None = None

    @wraps(AnnotatedSFTTrainer.__init__)
    def __init__(self, *args, **kwargs):
        self._reference_phase = ReferencePhase(inspect.signature(super().__init__).bind(*args, **kwargs).arguments)
        super().__init__(*args, **kwargs)
        if self.args.needs_reference:
            self._reference_phase.check(self)
        self.add_missing_callback(BeginEpochCallback(self))

    # Data: every example has a number, by which its half is looked up

    @property
    def _has_numbers(self):
        """Streams, and packing that cuts examples, have no numbers: their pairs are drawn inside the micro-batch."""
        args = self.args
        is_whole = not args.packing or args.packing_strategy == "bfd"
        is_prepared = not (args.dataset_kwargs or {}).get("skip_prepare_dataset", False)
        return args.pair_sampling and is_whole and is_prepared and not self._is_streaming

    @property
    def annotation_columns(self):
        return {"example_number": NEITHER} if self._has_numbers else {}

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if dataset_name == "train" and self._has_numbers and "seq_lengths" in get_dataset_column_names(dataset):
            raise InputError(
                "`train_dataset` is packed already (it has the column `seq_lengths`), so its examples have no numbers "
                "that pairs go by. Give the rows before packing."
            )
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def annotate_untruncated(self, dataset, dataset_name, from_text):
        if self._is_streaming and self.args.needs_confidence:
            raise InputError(
                "`confidence_split='confidence'` needs all examples before training, but `train_dataset` is a stream. "
                "Load it without streaming, or set `confidence_split='random'`."
            )
        if self.args.needs_confidence and dataset_name == "train" and self.example_keys is None:
            if EXAMPLE_KEY in dataset.column_names:
                require_unique_keys(dataset)
            else:
                options = {**self._text_options, "is_prepared": from_text}
                dataset = add_content_keys(dataset, self.args.dataset_num_proc, **options)
            self.example_keys = dataset[EXAMPLE_KEY][:]
        return dataset

    @property
    def _text_options(self) -> dict[str, str | None]:
        return {"text_field": self.args.dataset_text_field, "eos_token": self._tokenizer.eos_token}

    def annotate(self, dataset, dataset_name):
        if not self._has_numbers:
            return dataset
        is_train = dataset_name == "train" and self.train_examples is None
        map_kwargs = map_description(dataset, self.args, f"Numbering examples of {dataset_name} dataset")
        with global_then_local_main_first():
            dataset = dataset.map(number_example, with_indices=True, fn_kwargs={"is_train": is_train}, **map_kwargs)
        if is_train:
            check_number(dataset["num_labels"])
            self.train_examples = dataset
            self.halves = self._halves_at_the_start()
        return dataset

    def annotation_settings(self, columns, is_packed):
        return {}  # an example's number depends on nothing, and is given anew

    def _halves_at_the_start(self) -> torch.Tensor:
        args, num_examples = self.args, len(self.train_examples)
        if not args.needs_confidence:
            return random_halves(num_examples, args.seed)
        if args.confidence_source == "file":
            measure = args.confidence_measure
            return halves_from_file(args.confidence_file, self.train_examples, measure, **self._text_options)
        return torch.full((num_examples,), NEITHER, dtype=torch.int8)

    # Pairs

    def _get_train_sampler(self, train_dataset=None):
        if not self._has_numbers or self.args.packing:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._pair_sampler = PairSampler(self._halves_of_rows(), seed)
        return self._pair_sampler

    def _halves_of_rows(self):
        return self.halves[torch.tensor(self.train_dataset["example_row"][:])]

    def begin_epoch(self, epoch: int) -> None:
        """Draw the pairs of this epoch from now on, and with `confidence_source="online"` split the examples anew."""
        if self._online is not None:
            self._online.check(self.state)
            self.halves = self._online.begin_epoch(epoch, self.accelerator)
        if self._pair_sampler is not None:
            self._pair_sampler.halves = self._halves_of_rows()
            self._pair_sampler.set_epoch(epoch)

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
        return {**inputs, **draw_mixup(inputs, self.halves, args.packing, args.mixup_alpha, args.seed, step)}

    # Loss

    def count_items(self, inputs):
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
        """As [`AnnotatedSFTTrainer.train`]; `resume_from_checkpoint=True` goes on in the phase that was stopped."""
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if self.args.needs_reference:
            path = self._reference_phase.run(
                self, self.train_examples, self.example_keys, bool(resume_from_checkpoint), checkpoint
            )
            measure = self.args.confidence_measure
            # Other machines may have no such file
            self.halves = on_main_process(
                partial(halves_from_file, path, self.train_examples, measure, skip_missing=True)
            )
            set_seed(self.args.seed)  # as if nothing had been before
        return super().train(checkpoint, trial, ignore_keys_for_eval)

    def begin_run(self, checkpoint):
        super().begin_run(checkpoint)
        if self.args.needs_confidence and self.args.confidence_source == "online":
            self._online = OnlineConfidence(len(self.train_examples), self.args.confidence_measure)
            if checkpoint is not None:
                self._online.load(checkpoint, self.accelerator)

    def checkpoint_to_resume(self, resume_from_checkpoint):
        is_begun = self.args.needs_reference and on_main_process(reference_folder(self.args).is_dir)
        if resume_from_checkpoint is True and is_begun and last_checkpoint(self.args.output_dir) is None:
            return None  # the run was stopped in its first phase, or between the two
        if isinstance(resume_from_checkpoint, str | Path) and Path(resume_from_checkpoint).resolve().is_relative_to(
            reference_folder(self.args).resolve()
        ):
            raise InputError(
                f"`resume_from_checkpoint={str(resume_from_checkpoint)!r}` is a checkpoint of the reference, which is "
                "not the model that is trained now. Set it to True to go on in the phase that was stopped."
            )
        return super().checkpoint_to_resume(resume_from_checkpoint)

    def _save_checkpoint(self, model, trial):
        if self._online is not None:
            self._online.save(self.checkpoint_folder(), self.accelerator)
        super()._save_checkpoint(model, trial)

    def not_pushed(self):
        return [*super().not_pushed(), *not_pushed(self.args)]  # the reference; see `push_confidence`
