from dataclasses import fields
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from ..base import AnnotatedBatch, AnnotatedSFTTrainer
from ..base.preparation import map_description
from ..base.prepared_sets import MADE_WITH
from ..base.trl_internals import get_dataset_column_names
from ..errors import InputError
from .config import WeightedSFTConfig
from .token_weights import TokenWeigher, add_token_weights


class WeightedSFTTrainer(AnnotatedSFTTrainer):
    r"""
    Trainer for weighted supervised fine-tuning: each token's loss is multiplied by a weight.

    The weights come from columns (of tokens, of rows), from messages, or from the parts of a response (prompt,
    reasoning, answer); they multiply. With a token's weight \\( w_t \\), the loss of an optimizer step is

    $$ L = \frac{\sum_t w_t \, (-\log p_t)}{\sum_t w_t} $$

    over all micro-batches and processes, or with `weight_normalization="tokens"`, the same sum over the number of
    tokens with a label. A token with weight 0 has no label: it does not count and does not go through the LM head.

    Takes the arguments of [`~trl.SFTTrainer`] and differs from it in the loss. Evaluation uses the weights, too.

    Requirements:
        1. Evaluation sets have the columns and keys with weights that the configuration names, too.
        2. `token_weight_column` needs rows of tokens (`input_ids`); `message_weight_key` needs messages.

    Logs, in addition to SFTTrainer's metrics and `nll` (without weights):
        - `weighted/nll`: the weighted mean of the tokens' loss, in nats;
        - `weighted/mean_weight`: the mean weight of the tokens with a label.

    Relations:
        - With weights of 1, [`~trl.SFTTrainer`]; with weights of 0 and 1, `SFTTrainer` without the labels of weight 0.

    Example:

    ```python
    from datasets import load_dataset
    from hf_sft_variants import WeightedSFTConfig, WeightedSFTTrainer

    dataset = load_dataset("trl-lib/Capybara", split="train")
    dataset = dataset.map(lambda row: {"quality": 1 / len(row["messages"])})
    trainer = WeightedSFTTrainer(
        "Qwen/Qwen2.5-0.5B",
        args=WeightedSFTConfig("Qwen2.5-0.5B-weighted", example_weight_column="quality"),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Raises:
        `InputError`: For a column that is missing, a weight that is negative or not a number, and a message or answer
            that is not found; the message names the row.
    """

    _tag_names = ["trl", "sft", "weighted", "hf_sft_variants"]
    _name = "Weighted SFT"
    config_class = WeightedSFTConfig
    annotation_columns = {"token_weights": 0.0}
    _columns_compared_on_resume = ["token_weights"]

    # Annotation: a weight for each token

    def annotation_settings(self, columns: list[str], is_packed: bool) -> dict[str, Any]:
        settings = super().annotation_settings(columns, is_packed)
        return {name: value for name, value in settings.items() if name != "weight_normalization"}

    def annotate_untruncated(
        self, dataset: Dataset | IterableDataset, dataset_name: str, from_text: bool
    ) -> Dataset | IterableDataset:
        if MADE_WITH in get_dataset_column_names(dataset):  # with the same settings, or it would have been refused
            return dataset
        args = self.args
        fn_kwargs = {
            "weigh": TokenWeigher(**{field.name: getattr(args, field.name) for field in fields(TokenWeigher)}),
            "tokenizer": self._tokenizer,
            "chat_template": self.chat_template,
            "text_field": args.dataset_text_field,
            "has_text": from_text,
            "dataset_name": dataset_name,
        }
        map_kwargs = map_description(dataset, args, f"Weighting tokens of {dataset_name} dataset")
        return dataset.map(add_token_weights, batched=True, with_indices=True, fn_kwargs=fn_kwargs, **map_kwargs)

    def check_prepared(
        self, dataset: Dataset | IterableDataset, packing: bool, dataset_name: str
    ) -> dict[str, Any] | None:
        made_with = super().check_prepared(dataset, packing, dataset_name)
        if made_with is None and not self._skip_prepare_dataset:  # before anything is tokenized
            self._check_columns(get_dataset_column_names(dataset), dataset_name)
            self._require_message_key(dataset.features or {}, dataset_name)
        return made_with

    def _check_columns(self, columns: list[str], dataset_name: str) -> None:
        from_text = "input_ids" not in columns
        for name in ("token_weight_column", "example_weight_column"):
            column = getattr(self.args, name)
            if column is not None and column not in columns:
                raise InputError(
                    f"The {dataset_name} dataset has no column `{column}`, which `{name}` names; it has {columns}."
                )
        key, prompt_weight = self.args.message_weight_key, self.args.prompt_weight
        if from_text and self.args.token_weight_column is not None:
            raise InputError(
                f"`token_weight_column` is for tokens, but the {dataset_name} dataset has text. Give `input_ids`."
            )
        if not from_text and key is not None:
            raise InputError(
                f"`message_weight_key={key!r}` needs messages, but the {dataset_name} dataset has `input_ids`."
            )
        leaves_in = self.args.completion_only_loss is False and not self.args.assistant_only_loss
        if prompt_weight is not None and leaves_in and "prompt" in columns:
            raise InputError(
                f"`prompt_weight={prompt_weight}` is for prompts that `SFTTrainer` leaves out of the loss, but "
                "`completion_only_loss=False` leaves them in. Set only one of them."
            )

    def _require_message_key(self, features: dict[str, Any], dataset_name: str) -> None:
        """Refuse a key that no message has, such as a misspelt one. Streams may not know their keys."""
        key = self.args.message_weight_key
        columns = (getattr(features.get(name), "feature", None) for name in ("messages", "prompt", "completion"))
        keys = {name for of_messages in columns if isinstance(of_messages, dict) for name in of_messages}
        if key is not None and keys and key not in keys:
            raise InputError(
                f"No message of the {dataset_name} dataset has the key `{key}`, which `message_weight_key` names; "
                f"they have {sorted(keys)}."
            )

    # Loss

    def count_items(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor | int]:
        is_labelled = inputs["labels"][:, 1:] != -100
        return {"weights": (inputs["token_weights"][:, 1:] * is_labelled).sum()}

    def compute_annotated_loss(self, batch: AnnotatedBatch) -> torch.Tensor:
        weights = batch.annotations["token_weights"] * batch.label_mask
        loss_sum = -(weights * batch.log_probs).sum()
        batch.metrics["weighted/nll"] = (loss_sum.detach(), weights.sum())
        batch.metrics["weighted/mean_weight"] = (weights.sum(), batch.label_mask.sum())
        return loss_sum / batch.num_items[self.args.weight_normalization]
