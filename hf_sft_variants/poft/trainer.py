import textwrap
from functools import cached_property

import torch
from accelerate.logging import get_logger
from datasets import IterableDataset

from ..base import AnnotatedBatch, AnnotatedSFTTrainer
from ..base.batch import count_supervised_samples
from ..base.fingerprints import describe_content
from ..base.preparation import map_description
from ..base.trl_internals import get_dataset_column_names, global_then_local_main_first
from ..errors import InputError
from ..scoring import describe_model
from .config import PoFTConfig
from .loss import preference_loss
from .metrics import PreferenceMetrics, preference_metrics
from .reference_scoring import ReferenceScoringCallback
from .references import (
    COLUMN,
    add_reference_log_probs,
    drop_unscored,
    names_of_prepared,
    number_in_column,
    reference_names,
    spread_over_tokens,
)
from .score_files import add_content_keys, join_by_key, read_score_files
from .scored_tokens import add_scored_mask, has_responses


logger = get_logger(__name__)

# Column with the reference models' values of an example, of scores that did not come with the data
_JOINED_COLUMN = "reference_log_probs"


class PoFTTrainer(AnnotatedSFTTrainer):
    """
    Trainer for PoFT, preference-oriented supervised fine-tuning.

    Trains the model to find each response more likely than aligned reference models find it: an example's
    cross-entropy weighs little where the model is ahead of them already, or where they, too, find the response
    unlikely, as they do with bad data. The reference models score the data once, before training, each in its own chat
    template ([`ReferenceScoringCallback`]); no example weighs more for being longer. Differs from [`~trl.SFTTrainer`]
    in the loss, and takes the same arguments. Method: [PoFT](https://huggingface.co/papers/2412.12865).

    In the loss are the assistant's words and its end-of-turn tokens, of all its turns; of a prompt and a completion
    those of the completion; of rows that come as tokens, the labels. Examples whose words `max_length` cuts, or that
    are too long for a reference model, are dropped and counted.

    Logs beside SFTTrainer's metrics and `nll` (of all labels) means over examples: `poft/loss` (the loss, also in
    evaluation on packed rows, where `eval_loss` is a mean over batches); in nats per token
    `poft/r_theta` (log-probability of the model), `poft/reference_mean`, `poft/reference_<name>` of each reference
    model, `poft/margin` (the model's minus the references' mean); of the weights τ `poft/tau_mean`, `poft/tau_min`,
    `poft/tau_max` and `poft/effective_sample_size` (share of the examples that would weigh as much if all weighed the
    same); and `poft/win_rate`, the share of examples with a positive margin.

    Example:

    ```python
    from datasets import load_dataset
    from hf_sft_variants import PoFTConfig, PoFTTrainer

    trainer = PoFTTrainer(
        "Qwen/Qwen2.5-0.5B",
        args=PoFTConfig("Qwen2.5-0.5B-PoFT", reference_models=["Qwen/Qwen2.5-7B-Instruct", "01-ai/Yi-6B-Chat"]),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()
    ```

    Raises:
        `InputError`: If there are no reference scores, or not for all examples; for streams without
            `reference_score_column`; if the assistant's words can't be found in what a chat template makes of them.
    """

    _tag_names = ["trl", "sft", "poft", "hf_sft_variants"]
    _name = "PoFT"
    _paper = {
        "title": "Preference-Oriented Supervised Fine-Tuning: Favoring Target Model Over Aligned Large Language "
        "Models",
        "id": "2412.12865",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{poft2025,
                title     = {{Preference-Oriented Supervised Fine-Tuning: Favoring Target Model Over Aligned Large
                             Language Models}},
                author    = {Yuchen Fan and Yuzhong Hong and Qiushi Wang and Junwei Bao and Hongfei Jiang and
                             Yang Song},
                booktitle = {AAAI},
                year      = 2025,
                eprint    = {arXiv:2412.12865},
            }"""),
    }
    config_class = PoFTConfig
    metric_sums_class = PreferenceMetrics
    group_names = {"scored_mask": {1: "scored"}}
    _reference_names: list[str] | None = None

    def method_callbacks(self):
        if self.args.needs_references and not self._num_references:
            raise InputError(
                f"With `skip_prepare_dataset=True` the train dataset must bring the columns `{COLUMN.format(0)}`, ... "
                "with each reference model's mean log-probability on every token, beside `scored_mask`."
            )
        return [self.reference_scoring] if self.reference_scoring else []

    @cached_property
    def reference_scoring(self) -> ReferenceScoringCallback | None:
        """What scores the data: the user's callback, or one from the configuration."""
        args, others = self.args, ("reference_models", "reference_score_file")
        if not args.needs_references:
            return None
        given = [callback for callback in self.given_callbacks if isinstance(callback, ReferenceScoringCallback)]
        if given:
            for name in others:
                if getattr(args, name):
                    raise InputError(
                        f"`{name}={getattr(args, name)}` and a `ReferenceScoringCallback` among the `callbacks` both "
                        "bring reference models. Remove one of them."
                    )
            return given[0]
        if args.reference_score_file or not args.reference_models:
            return None
        return ReferenceScoringCallback(
            args.reference_models,
            model_init_kwargs=args.reference_model_init_kwargs,
            score_cache_dir=args.score_cache_dir,
            batch_tokens=args.reference_batch_tokens,
        )

    # Annotation: which tokens are scored, and what the reference models found

    @property
    def annotation_columns(self):
        return {"scored_mask": 0, **{COLUMN.format(j): 0.0 for j in range(self._num_references)}}

    @property
    def _num_references(self):
        return len(self._reference_names or [])

    def annotation_settings(self, columns, is_packed):
        args = self.args
        if not args.needs_references:
            return {"score_end_of_turn": args.score_end_of_turn, "preference_weighting": "uniform"}
        settings = {"score_end_of_turn": args.score_end_of_turn, "preference_weighting": "not uniform"}
        if args.reference_score_column in columns:  # the user's own scores
            return settings
        if args.reference_score_file:
            files = [describe_content(file) for file in args.reference_score_file]
            settings |= {"reference_score_file": files, "length_normalizer": args.length_normalizer}
        elif self.reference_scoring:
            kwargs = self.reference_scoring.model_init_kwargs
            models = [describe_model(model, kwargs) for model in self.reference_scoring.models]
            settings |= {"reference_models": models, "length_normalizer": args.length_normalizer}
        return settings

    def own_token_columns(self):
        return []

    def check_prepared(self, dataset, packing, dataset_name):
        prepared = names_of_prepared(get_dataset_column_names(dataset)) if self.args.needs_references else []
        models = self.args.reference_models or prepared
        if prepared:
            self._set_references(models if len(models) == len(prepared) else prepared, dataset_name)
        made_with = super().check_prepared(dataset, packing, dataset_name)
        if prepared and len(models) != len(prepared):
            raise InputError(
                f"The {dataset_name} dataset is prepared with the scores of {len(prepared)} reference models, but "
                f"`reference_models={models}` names {len(models)}. Name those, or none."
            )
        return made_with

    def user_token_columns(self):
        return ["scored_mask"]

    def prepare_rows(self, dataset, dataset_name):
        column = COLUMN.format(0)
        if self.args.needs_references and column in get_dataset_column_names(dataset):
            raise InputError(
                f"The {dataset_name} dataset has the column `{column}`, which this trainer makes, but no `input_ids`. "
                "Rename the column or remove it; scores of your own belong in `reference_score_column`."
            )
        if self._is_to_be_scored(dataset, dataset_name):  # keyed by the rows as they came, whatever model is trained
            return add_content_keys(dataset, self.args.dataset_num_proc, self.args.dataset_text_field)
        return dataset

    def annotate_untruncated(self, dataset, dataset_name, has_text):
        columns = get_dataset_column_names(dataset)
        self._rows_have_responses = has_text and has_responses(columns)
        if self._is_to_be_scored(dataset, dataset_name) and not has_text:
            dataset = add_content_keys(dataset, self.args.dataset_num_proc)
        fn_kwargs = {
            "tokenizer": self._tokenizer,
            "chat_template": self.chat_template,
            "has_responses": self._rows_have_responses,
            "end_of_turn": self.args.score_end_of_turn,
            "dataset_name": dataset_name,
        }
        map_kwargs = map_description(dataset, self.args, f"Finding responses of {dataset_name} dataset")
        return dataset.map(add_scored_mask, batched=True, with_indices=True, fn_kwargs=fn_kwargs, **map_kwargs)

    def score(self, dataset, dataset_name):
        with global_then_local_main_first():
            dataset = drop_unscored(dataset, self.args, dataset_name)
        if not self._is_to_be_scored(dataset, dataset_name):
            return dataset
        args = self.args
        if args.reference_score_file:
            scores = read_score_files(args.reference_score_file, args.score_end_of_turn)
            models = args.reference_models or scores["model"].unique().to_pylist()
        else:
            scores = self.reference_scoring.score(
                dataset, dataset_name, self._tokenizer, args, self._rows_have_responses
            )
            models = self.reference_scoring.models
        self._set_references(models, dataset_name)
        values = {model: join_by_key(dataset, scores, model, args.length_normalizer, dataset_name) for model in models}
        with global_then_local_main_first():
            return add_reference_log_probs(dataset, values, _JOINED_COLUMN, dataset_name)

    def annotate(self, dataset, dataset_name):
        columns = get_dataset_column_names(dataset)
        if not self.args.needs_references:
            return dataset
        if COLUMN.format(0) in columns:  # a data set that was prepared before
            return dataset
        column = _JOINED_COLUMN
        if self.args.reference_score_column in columns:
            column = self.args.reference_score_column
            if self.args.reference_score_file:
                logger.warning(
                    f"The {dataset_name} dataset has the column `{column}`, so "
                    f"`reference_score_file={self.args.reference_score_file}` is not read for it."
                )
            number = number_in_column(dataset, self.args, dataset_name)
            self._set_references(self.args.reference_models or [str(j) for j in range(number)], dataset_name)
        fn_kwargs = {"column": column, "num_references": self._num_references, "dataset_name": dataset_name}
        map_kwargs = map_description(dataset, self.args, f"Adding reference scores to {dataset_name} dataset")
        return dataset.map(spread_over_tokens, fn_kwargs=fn_kwargs, **map_kwargs)

    def _is_to_be_scored(self, dataset, dataset_name) -> bool:
        args, columns = self.args, get_dataset_column_names(dataset)
        if not args.needs_references or args.reference_score_column in columns or COLUMN.format(0) in columns:
            return False
        if not (self.reference_scoring or args.reference_score_file):
            raise InputError(
                f"PoFT compares with reference models, but there is none for the {dataset_name} dataset: set "
                "`reference_models` or `reference_score_file`, give the data set a column "
                f"`{args.reference_score_column}`, or set `preference_weighting='uniform'`."
            )
        if isinstance(dataset, IterableDataset):
            raise InputError(
                f"The {dataset_name} dataset is a stream, but all its examples have to be scored before training. "
                f"Load it without streaming, or give it a column `{args.reference_score_column}`."
            )
        return True

    def _set_references(self, models, dataset_name):
        names = reference_names(models)
        if self._reference_names is not None and len(names) != self._num_references:
            raise InputError(
                f"The {dataset_name} dataset has scores of {len(names)} reference models, the train dataset of "
                f"{self._num_references}. Give both the same."
            )
        self._reference_names = self._reference_names or names

    # Loss

    def count_items(self, inputs):
        labels = inputs["labels"].masked_fill(inputs["scored_mask"] == 0, -100)
        return {"samples": count_supervised_samples({**inputs, "labels": labels})}

    def compute_annotated_loss(self, batch: AnnotatedBatch) -> torch.Tensor:
        references = [batch.annotations[COLUMN.format(j)] for j in range(self._num_references)]
        result = preference_loss(
            batch.log_probs,
            (batch.annotations["scored_mask"] == 1) & batch.label_mask,
            batch.sample_ids,
            batch.num_samples,
            torch.stack(references) if references else batch.log_probs.new_empty(0, *batch.log_probs.shape),
            self.args.beta,
            self.args.gamma,
            self.args.preference_weighting,
        )
        batch.metrics.update(preference_metrics(result, self._reference_names or []))
        return result.loss_sum / batch.num_items["samples"]
