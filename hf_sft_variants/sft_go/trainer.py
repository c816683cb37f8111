import math
import textwrap

import torch
import torch.nn.functional as F

from ..base import AnnotatedBatch, AnnotatedSFTTrainer
from ..base.preparation import map_description
from .config import SFTGOConfig
from .grouping import IMPORTANT, MAX_GROUPS, UNGROUPED, add_group_ids, copy_group_ids, copy_scores, special_token_ids
from .loss import GroupOptimization, group_optimization, uniform_token_weights
from .tfidf import TokenTfidf, add_tfidf_scores, load_or_fit_tfidf


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
    `sft_go/group_<id>_nll` and `sft_go/group_<id>_is_worst` (of the samples with this group and another).

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
                year   = 2025,
                eprint = {arXiv:2506.15021},
            }"""),
    }
    config_class = SFTGOConfig
    annotation_columns = {"group_ids": UNGROUPED}

    _tfidf: TokenTfidf | None = None

    # Annotation: a group id for each token

    def user_token_columns(self):
        return [column for column in (self.args.importance_column, self.args.group_column) if column is not None]

    def annotate(self, dataset, dataset_name):
        args = self.args
        if args.group_column is not None:
            return self._copy_column(dataset, args.group_column, copy_group_ids, dataset_name)
        if args.importance_column is not None:
            dataset = self._copy_column(dataset, args.importance_column, copy_scores, dataset_name)
        else:
            dataset = self._add_tfidf_scores(dataset, dataset_name)
        first_token_ids = special_token_ids(self._tokenizer) if args.special_tokens_important else set()
        return dataset.map(
            add_group_ids,
            batched=True,
            fn_kwargs={
                "important_fraction": args.important_fraction,
                "min_grouped_tokens": args.min_grouped_tokens,
                "first_token_ids": first_token_ids,
            },
            **map_description(dataset, args, f"Grouping tokens of {dataset_name} dataset"),
        )

    def _copy_column(self, dataset, column, function, dataset_name):
        return dataset.map(
            function,
            with_indices=True,
            fn_kwargs={"column": column, "dataset_name": dataset_name},
            **map_description(dataset, self.args, f"Checking column {column} of {dataset_name} dataset"),
        )

    def _add_tfidf_scores(self, dataset, dataset_name):
        if self._tfidf is None:  # the training set comes first, evaluation sets use its document frequencies
            self._tfidf = load_or_fit_tfidf(dataset, self.args.tfidf_file, self._tokenizer)
        return dataset.map(
            add_tfidf_scores,
            batched=True,
            fn_kwargs={"idf": self._tfidf.transformer.idf_},
            **map_description(dataset, self.args, f"Weighing tokens of {dataset_name} dataset"),
        )

    # Loss

    def compute_annotated_loss(self, batch: AnnotatedBatch) -> torch.Tensor:
        uniform = self.args.sample_weighting == "uniform"
        if uniform:
            token_weights = uniform_token_weights(batch.label_mask, batch.sample_ids, batch.num_samples)
        else:
            token_weights = batch.label_mask.float()
        whole_batch = self.args.group_scope == "micro_batch"
        worst_group_weight = self.current_worst_group_weight()
        result = group_optimization(
            batch.log_probs,
            token_weights,
            batch.annotations["group_ids"],
            scope_ids=torch.zeros_like(batch.sample_ids) if whole_batch else batch.sample_ids,
            num_scopes=1 if whole_batch else batch.num_samples,
            worst_group_weight=worst_group_weight,
        )
        batch.metrics["sft_go/worst_group_weight"] = (worst_group_weight, 1)
        batch.metrics.update(self._group_metrics(result))
        return result.loss_sum / batch.num_items["samples" if uniform else "tokens"]

    def current_worst_group_weight(self) -> float:
        """λ at this step: moves from `worst_group_weight` to `worst_group_weight_end` by `worst_group_schedule`."""
        start, end = self.args.worst_group_weight, self.args.worst_group_weight_end
        progress = self.state.global_step / max(self.state.max_steps, 1)
        if self.args.worst_group_schedule == "linear":
            return start + (end - start) * progress
        if self.args.worst_group_schedule == "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
        return start

    def _group_metrics(self, result: GroupOptimization) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        own_ids = self.args.group_column is not None
        names = [f"group_{group}" for group in range(MAX_GROUPS)] if own_ids else ["unimportant", "important"]
        # Every process has to log the same names, whatever groups its batch has
        missing = len(names) - result.group_weight.size(1)
        weight, nll = (F.pad(values, (0, missing)) for values in (result.group_weight, result.group_nll))
        comparable = (weight > 0).sum(dim=1) > 1
        metrics = {}
        for group, name in enumerate(names):
            metrics[f"sft_go/{name}_nll"] = ((weight * nll)[:, group].sum(), weight[:, group].sum())
            if own_ids or group == IMPORTANT:
                compared = comparable & (weight[:, group] > 0)
                is_worst = compared & (result.worst_group == group)
                metrics[f"sft_go/{name}_is_worst"] = (is_worst.sum(), compared.sum())
        return metrics
