import math
import textwrap
from functools import wraps
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from ..base import AnnotatedBatch, AnnotatedSFTTrainer
from ..base.preparation import map_description, named_sets
from ..base.prepared_sets import MADE_WITH
from ..base.trl_internals import get_dataset_column_names, global_then_local_main_first
from ..errors import InputError
from ..scoring import describe_model
from ..text.special_tokens import special_token_ids
from .config import SFTGOConfig
from .excess_loss import group_by_excess_loss
from .grouping import (
    Group,
    RankedGroup,
    add_group_ids,
    add_rankable_groups,
    add_token_scores,
    copy_group_ids,
    copy_scores,
    has_groups,
)
from .llmlingua2 import importance_scores
from .loss import group_optimization, uniform_token_weights
from .metrics import WorstGroupFlips, group_metrics
from .reference_log_probs import drop_too_long, reference_log_probs
from .tfidf import TokenTfidf, add_tfidf_scores, shared_tfidf


logger = get_logger(__name__)


class SFTGOTrainer(AnnotatedSFTTrainer):
    """
    Trainer for SFT-GO, supervised fine-tuning with group optimization.

    Groups the tokens of each sample by importance and trains on a mix of the cross-entropy and the loss of the worst
    group: the one the model is worst at. Differs from [`~trl.SFTTrainer`] in the loss alone and takes the same
    arguments. Method: [SFT-GO](https://huggingface.co/papers/2506.15021). No official code is known, so what the
    paper's abstract does not fix (see [`SFTGOConfig`] and `group_optimization`) is our reconstruction.

    Logs beside SFTTrainer's metrics and `nll`: `sft_go/worst_group_weight` (the current λ); of groups by importance
    `sft_go/important_nll`, `sft_go/unimportant_nll` (nats per token) and `sft_go/important_is_worst` (of the samples,
    or micro-batches, with both groups the share in which the important one has the higher loss); of own group ids
    `sft_go/group_<id>_nll` and `sft_go/group_<id>_is_worst` (of the samples with this group and another); with scope
    `"sample"`, from the second epoch on, `sft_go/flip_rate` (share of the samples whose worst group has changed since
    the epoch before).

    Example:

    ```python
    from datasets import load_dataset
    from hf_sft_variants import SFTGOTrainer

    trainer = SFTGOTrainer("Qwen/Qwen2.5-0.5B", train_dataset=load_dataset("trl-lib/Capybara", split="train"))
    trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "sft-go", "hf_sft_variants"]
    _name = "SFT-GO"
    _paper = {
        "title": "SFT-GO: Supervised Fine-Tuning with Group Optimization for Large Language Models",
        "id": "2506.15021",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{sftgo2025,
                title  = {{SFT-GO: Supervised Fine-Tuning with Group Optimization for Large Language Models}},
                author = {Gyuhak Kim and Sumiran Singh Thakur and Su Min Park and Wei Wei and Yujia Bao},
                year   = 2025,
                eprint = {arXiv:2506.15021},
            }"""),
    }
    config_class = SFTGOConfig
    _tfidf: TokenTfidf | None = None

    @wraps(AnnotatedSFTTrainer.__init__)  # type: ignore[misc]  # mypy: a decorated constructor
    def __init__(self, *args, **kwargs):
        arguments = self.bind_arguments(*args, **kwargs)
        skips = (arguments["args"].dataset_kwargs or {}).get("skip_prepare_dataset", False)
        eval_sets = named_sets(arguments.get("eval_dataset"))
        for name, dataset in (("train", arguments.get("train_dataset")), *eval_sets.items()):
            # Prepared rows may have their scores
            if isinstance(dataset, IterableDataset) and not (skips or MADE_WITH in get_dataset_column_names(dataset)):
                _refuse_stream(dataset, arguments["args"], name)
        super().__init__(**arguments)
        self._worst_group_flips = WorstGroupFlips()
        self.add_callback(self._worst_group_flips)

    @property
    def annotation_columns(self) -> dict[str, int | float]:  # type: ignore[override]  # an attribute of the base
        args = self.args
        reference = {"reference_log_probs": 0.0} if args.group_by == "rho1" else {}
        number = {"example_number": -1} if self._tracks_flips else {}
        columns = {"group_ids": self._no_group, **number, **reference}
        return columns | {name: 0.0 for name in self._columns_of_the_user if name not in columns}

    @property
    def _columns_of_the_user(self):
        return frozenset(filter(None, (self.args.importance_column, self.args.group_column)))

    @property
    def _no_group(self) -> int:
        if self.args.group_column is not None:
            return int(Group.UNGROUPED)
        return RankedGroup.UNGROUPED if self.args.group_by == "rho1" else Group.UNGROUPED

    @property
    def _tracks_flips(self):
        """Flips can be counted only for samples that are whole, known by their number, and seen again."""
        whole_samples = not self.args.packing or self.args.packing_strategy == "bfd"
        prepared = not (self.args.dataset_kwargs or {}).get("skip_prepare_dataset", False)
        return self.args.group_scope == "sample" and whole_samples and prepared and not self._is_streaming

    # Annotation: a group id for each token

    def annotation_settings(self, columns: list[str], is_packed: bool) -> dict[str, Any]:
        args = self.args
        reference = self._describe_scoring_model() if args.group_by == "rho1" else {"reference_model": None}
        if not is_packed:  # groups are made anew, but examples that were too long for a reference model are gone
            return reference
        names = ["group_by", "group_scope", "group_column", "importance_column"]
        if args.group_column is None:
            names += ["min_grouped_tokens", "special_tokens_important"]
            names += [] if args.group_by == "rho1" else ["important_fraction"]
        settings = {**{name: getattr(args, name) for name in names}, **reference}
        if args.group_by == "llmlingua2":
            settings |= self._describe_scoring_model()
        elif args.group_by == "tfidf":
            tfidf = self._tfidf or TokenTfidf.load(args.tfidf_file, self._tokenizer)
            settings |= {} if tfidf is None else {"document_frequencies": tfidf.digest()}
        return settings

    def _describe_scoring_model(self):
        """Describe the scoring model; empty if it is not on this machine, which may be so for packed rows."""
        args = self.args
        name = "reference_model" if args.group_by == "rho1" else "importance_model"
        try:
            return {name: describe_model(getattr(args, name), args.reference_model_init_kwargs)}
        except (InputError, OSError):
            logger.warning(f"`{name}={getattr(args, name)!r}` is not here: whether it scored the data is not known.")
            return {}

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        dataset = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        self._fit_tfidf(dataset, dataset_name)  # of a training set that came packed
        return dataset

    def describe_run(self) -> dict[str, Any]:
        run = super().describe_run()
        if self._tfidf is not None and self._is_streaming:  # nothing else identifies a stream
            source = "`tfidf_file`" if self.args.tfidf_file else "the start of the stream"
            run["settings"]["document_frequencies"] = f"{self._tfidf.digest()} (of {source})"
        return run

    def _fit_tfidf(self, dataset, dataset_name):
        """Fit on the training set, which comes first; evaluation sets use its document frequencies."""
        if self.args.group_by == "tfidf" and dataset_name == "train" and self._tfidf is None:
            self._tfidf = shared_tfidf(dataset, self.args.tfidf_file, self._tokenizer)

    def annotate(self, dataset: Dataset | IterableDataset, dataset_name: str) -> Dataset | IterableDataset:
        self._fit_tfidf(dataset, dataset_name)
        dataset = self._add_model_scores(dataset, dataset_name)
        with global_then_local_main_first():
            dataset = self._group(dataset, dataset_name)
        if dataset_name == "train":
            self._warn_about_groups(dataset)
        return dataset

    def _add_model_scores(self, dataset, dataset_name):
        if self.args.group_by not in ("llmlingua2", "rho1"):
            return dataset
        _refuse_stream(dataset, self.args, dataset_name)
        if self.args.group_by == "llmlingua2":
            scores = importance_scores(dataset, self.args, self._tokenizer, dataset_name)
            return add_token_scores(dataset, scores, "importance_scores")
        dataset = drop_too_long(dataset, self.args, dataset_name)
        scores = reference_log_probs(dataset, self.args, self._tokenizer, dataset_name)
        return add_token_scores(dataset, scores, "reference_log_probs")

    def _warn_about_groups(self, dataset):
        args = self.args
        if not has_groups(dataset):
            logger.warning(
                "No token of the train dataset is in a group, so this is plain supervised fine-tuning. Check "
                f"`min_grouped_tokens={args.min_grouped_tokens}` against the length of the responses, or your own "
                "group ids."
            )
        if args.packing and args.packing_strategy == "wrapped" and args.group_scope == "sample":
            logger.warning(
                "`packing_strategy='wrapped'` joins and cuts documents, so each packed row counts as one sample for "
                "groups and weights. Use `packing_strategy='bfd'` to keep samples apart."
            )

    def _group(self, dataset, dataset_name):
        description = f"Grouping tokens of {dataset_name} dataset"
        args, options = self.args, {"dataset_name": dataset_name}
        if args.group_column is not None:
            return self._map(dataset, copy_group_ids, description, column=args.group_column, **options)
        if args.importance_column is not None:
            dataset = self._map(dataset, copy_scores, description, column=args.importance_column, **options)
        if args.group_by == "tfidf":
            dataset = self._add_tfidf_scores(dataset, dataset_name)
        options = {
            "min_grouped_tokens": args.min_grouped_tokens,
            "first_token_ids": special_token_ids(self._tokenizer) if args.special_tokens_important else set(),
        }
        if args.group_by == "rho1":
            return self._map(dataset, add_rankable_groups, description, **options)
        return self._map(dataset, add_group_ids, description, important_fraction=args.important_fraction, **options)

    def _map(self, dataset, function, description, **fn_kwargs):
        map_kwargs = map_description(dataset, self.args, description)
        return dataset.map(function, batched=True, with_indices=True, fn_kwargs=fn_kwargs, **map_kwargs)

    def _add_tfidf_scores(self, dataset, dataset_name):
        map_kwargs = map_description(dataset, self.args, f"Weighing tokens of {dataset_name} dataset")
        fn_kwargs = {"idf": self._tfidf.idf}
        return dataset.map(add_tfidf_scores, batched=True, fn_kwargs=fn_kwargs, **map_kwargs)

    # Loss

    def compute_annotated_loss(self, batch: AnnotatedBatch) -> torch.Tensor:
        uniform = self.args.sample_weighting == "uniform"
        if uniform:
            token_weights = uniform_token_weights(batch.label_mask, batch.sample_ids, batch.num_samples)
        else:
            token_weights = batch.label_mask.float()
        segment_ids, num_segments = batch.sample_ids, batch.num_samples
        if self.args.group_scope == "micro_batch":
            segment_ids, num_segments = torch.zeros_like(segment_ids), 1
        # Evaluation does not follow the schedule: its losses are compared over the run
        training = self.model.training
        worst_group_weight = self.current_worst_group_weight() if training else self.args.worst_group_weight
        result = group_optimization(
            batch.log_probs,
            token_weights,
            self._group_ids(batch, segment_ids, num_segments),
            segment_ids,
            num_segments,
            worst_group_weight,
            # Rho-1 trains on the tokens with the highest excess loss, even if the others' plain loss is higher
            chosen_group=Group.IMPORTANT if self.args.group_by == "rho1" else None,
        )
        batch.metrics["sft_go/worst_group_weight"] = (worst_group_weight, 1)
        batch.metrics.update(group_metrics(result, own_ids=self.args.group_column is not None))
        if training and self._tracks_flips:
            flips = self._worst_group_flips.update(result, batch.annotations["example_number"], segment_ids)
            batch.metrics["sft_go/flip_rate"] = flips
        return result.loss_sum / batch.num_items["samples" if uniform else "tokens"]

    def _group_ids(self, batch: AnnotatedBatch, segment_ids: torch.Tensor, num_segments: int) -> torch.Tensor:
        if self.args.group_by != "rho1":
            return batch.annotations["group_ids"]
        return group_by_excess_loss(
            batch.log_probs,
            batch.annotations["reference_log_probs"],
            batch.annotations["group_ids"],
            segment_ids,
            num_segments,
            self.args.important_fraction,
        )

    def current_worst_group_weight(self) -> float:
        """λ at this step: moves from `worst_group_weight` to `worst_group_weight_end` by `worst_group_schedule`."""
        start, end = self.args.worst_group_weight, self.args.worst_group_weight_end
        progress = self.state.global_step / max(self.state.max_steps, 1)
        if self.args.worst_group_schedule == "linear":
            return start + (end - start) * progress
        if self.args.worst_group_schedule == "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
        return start


def _refuse_stream(dataset, args, dataset_name):
    if isinstance(dataset, IterableDataset) and args.group_by in ("llmlingua2", "rho1"):
        raise InputError(
            f"The {dataset_name} dataset is a stream, but all its examples have to be scored before training. Load it "
            "without streaming."
        )
