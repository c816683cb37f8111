import textwrap
from functools import cached_property, wraps
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from ..base import AnnotatedBatch, AnnotatedSFTTrainer
from ..base.batch import count_supervised_samples
from ..base.example_keys import add_content_keys
from ..base.fingerprints import describe_content
from ..base.preparation import keep_scorable, map_description, named_sets
from ..base.row_checks import require_row
from ..base.trl_internals import get_dataset_column_names, global_then_local_main_first
from ..errors import InputError
from ..scoring import describe_model
from .config import PoFTConfig
from .loss import preference_loss
from .reference_scoring import ReferenceScoringCallback
from .references import COLUMN, drop_unscored, number_in_data, reference_names, spread_over_tokens
from .score_files import join_by_key, read_score_files
from .scored_tokens import ScoredMask, add_scored_mask


logger = get_logger(__name__)

# Column with the reference models' values of an example, of scores that did not come with the data
_JOINED_COLUMN = "reference_log_probs"


class PoFTTrainer(AnnotatedSFTTrainer):
    r"""
    Trainer for PoFT, preference-oriented supervised fine-tuning.

    Trains the model to find each response more likely than aligned reference models find it: an example's
    cross-entropy weighs little where the model is ahead of them already, or where they, too, find the response
    unlikely, as they do with bad data. The reference models score the data once, before training, each in its own chat
    template ([`ReferenceScoringCallback`]). With \\( r_\theta \\) the model's mean log-probability of a response and
    \\( \overline{r} \\) the mean of the reference models', the loss is the mean over examples of

    $$ -\log \sigma(\beta (r_\theta - \overline{r}) + \gamma) $$

    Takes the arguments of [`~trl.SFTTrainer`]. No example weighs more for being longer.

    References:
        - [PoFT](https://huggingface.co/papers/2412.12865)

    Requirements:
        1. Reference models, a score file, or a column of scores ([`PoFTConfig`]); for streams the column.

    Inputs:
        - Scored are the assistant's words and its end-of-turn tokens, of all its turns; of a prompt and a completion
          those of the completion; of rows that come as tokens, the labels. Examples whose words `max_length` cuts, or
          that are too long for a reference model, are dropped and counted.

    Logs, in addition to SFTTrainer's metrics and `nll` (of all labels), means over examples:
        - `poft/loss`: the loss, also in evaluation on packed rows, where `eval_loss` is a mean over batches;
        - in nats per token `poft/r_theta` (log-probability of the model), `poft/reference_mean`,
          `poft/reference_<name>` of each reference model, `poft/margin` (the model's minus the references' mean);
        - of the weights τ `poft/tau_mean`, `poft/tau_min`, `poft/tau_max` and `poft/effective_sample_size` (share of
          the examples that would weigh as much if all weighed the same);
        - `poft/win_rate`: the share of examples with a positive margin.

    Relations:
        - With `preference_weighting="uniform"`, the mean cross-entropy of examples, which is [`~trl.SFTTrainer`]'s
          loss where all responses have the same length.

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

    @wraps(AnnotatedSFTTrainer.__init__)  # type: ignore[misc]  # mypy: a decorated constructor
    def __init__(self, *args, **kwargs):
        arguments = self.bind_arguments(*args, **kwargs)
        self.args = arguments["args"]
        self.reference_scoring = self._make_scoring(arguments.get("callbacks") or [])
        self._given_train_dataset = arguments.get("train_dataset")
        self._check_eval_datasets(arguments.get("eval_dataset"))
        super().__init__(**arguments)
        if self.reference_scoring:
            self.add_missing_callback(self.reference_scoring)

    def _make_scoring(self, callbacks) -> ReferenceScoringCallback | None:
        """What scores the data: the user's callback, or one from the configuration."""
        args = self.args
        if not args.needs_references:
            return None
        for callback in callbacks:
            if isinstance(callback, ReferenceScoringCallback):
                for name in ("reference_models", "reference_score_file"):
                    if getattr(args, name):
                        raise InputError(
                            f"`{name}={getattr(args, name)}` and a `ReferenceScoringCallback` among the `callbacks` "
                            "both bring reference models. Remove one of them."
                        )
                return callback
        if args.reference_score_file or not args.reference_models:
            return None
        models, kwargs = args.reference_models, args.reference_model_init_kwargs
        return ReferenceScoringCallback(models, kwargs, args.score_cache_dir, args.reference_batch_tokens)

    def _check_eval_datasets(self, eval_dataset) -> None:
        """Before the reference models score the training set, which may take hours."""
        named = named_sets(eval_dataset)
        datasets = [self._given_train_dataset, *named.values()]
        if not self.args.needs_references or not all(isinstance(each, Dataset | IterableDataset) for each in datasets):
            return  # what is not a data set is refused for itself
        for name, dataset in named.items():
            require_row(f"The {name} dataset", dataset)
            number = len(self._references_of(dataset, name))
            self._is_to_be_scored(dataset, name)
            if number != len(self._reference_names):
                raise InputError(
                    f"The {name} dataset has scores of {number} reference models, the train dataset of "
                    f"{len(self._reference_names)}. Give both the same."
                )

    # Annotation: which tokens are scored, and what the reference models found

    @property
    def annotation_columns(self) -> dict[str, int | float]:  # type: ignore[override]  # an attribute of the base
        references = {COLUMN.format(j): 0.0 for j in range(len(self._reference_names))}
        return {"scored_mask": ScoredMask.NOT_SCORED, **references}

    @cached_property
    def _reference_names(self) -> list[str]:
        """Names of the reference models in metrics; the train dataset says how many there are."""
        if not self.args.needs_references:
            return []
        return reference_names(self._references_of(self._given_train_dataset, "train"))

    def _references_of(self, dataset, dataset_name) -> list[str]:
        """The reference models that score a data set, or have scored it; numbers where they have no names."""
        args, number = self.args, number_in_data(dataset, self.args, dataset_name)
        if number:
            return args.reference_models or [str(j) for j in range(number)]
        if args.reference_score_file:
            return args.reference_models or self._scores_of_files["model"].unique().to_pylist()
        return self.reference_scoring.models if self.reference_scoring else []

    def annotation_settings(self, columns: list[str], is_packed: bool) -> dict[str, Any]:
        args = self.args
        if not args.needs_references:
            return {"score_end_of_turn": args.score_end_of_turn, "preference_weighting": "uniform"}
        settings = {"score_end_of_turn": args.score_end_of_turn, "preference_weighting": "not uniform"}
        settings["num_references"] = len(self._reference_names)
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

    def annotate_untruncated(
        self, dataset: Dataset | IterableDataset, dataset_name: str, from_text: bool
    ) -> Dataset | IterableDataset:
        args, columns = self.args, get_dataset_column_names(dataset)
        if self._is_to_be_scored(dataset, dataset_name):  # keyed by content, whatever model is trained
            text_options = (args.dataset_text_field, self._tokenizer.eos_token)
            dataset = add_content_keys(dataset, args.dataset_num_proc, *text_options, is_prepared=from_text)
        has_turns = "messages" in columns or {"prompt", "completion"} <= set(columns)
        fn_kwargs = {
            "tokenizer": self._tokenizer,
            "chat_template": self.chat_template,
            "has_responses": from_text and has_turns,
            "end_of_turn": args.score_end_of_turn,
            "dataset_name": dataset_name,
        }
        map_kwargs = map_description(dataset, args, f"Finding responses of {dataset_name} dataset")
        return dataset.map(add_scored_mask, with_indices=True, fn_kwargs=fn_kwargs, **map_kwargs)

    def annotate(self, dataset: Dataset | IterableDataset, dataset_name: str) -> Dataset | IterableDataset:
        args = self.args
        with global_then_local_main_first():
            dataset = drop_unscored(dataset, args, dataset_name)
        columns = get_dataset_column_names(dataset)
        if not args.needs_references or COLUMN.format(0) in columns:  # the latter was prepared before
            return dataset
        column = args.reference_score_column
        if column not in columns:
            column, dataset = _JOINED_COLUMN, self._score(dataset, dataset_name)
        elif args.reference_score_file:
            logger.warning(
                f"The {dataset_name} dataset has the column `{column}`, so "
                f"`reference_score_file={args.reference_score_file}` is not read for it."
            )
        number = len(self._reference_names)
        fn_kwargs = {"column": column, "num_references": number, "dataset_name": dataset_name}
        map_kwargs = map_description(dataset, args, f"Adding reference scores to {dataset_name} dataset")
        with global_then_local_main_first():
            return dataset.map(spread_over_tokens, fn_kwargs=fn_kwargs, **map_kwargs)

    def _score(self, dataset, dataset_name):
        args, models = self.args, self._references_of(dataset, dataset_name)
        if args.reference_score_file:
            scores = self._scores_of_files
        else:
            scores = self.reference_scoring.score(dataset, dataset_name, self._tokenizer, args)
        values = {model: join_by_key(dataset, scores, model, args.length_normalizer, dataset_name) for model in models}
        can_score = {model: [value is not None for value in of_model] for model, of_model in values.items()}
        with global_then_local_main_first():
            if _JOINED_COLUMN in dataset.column_names:
                dataset = dataset.remove_columns(_JOINED_COLUMN)
            rows = [list(of_row) for of_row in zip(*values.values(), strict=True)]
            return keep_scorable(dataset.add_column(_JOINED_COLUMN, rows), can_score, dataset_name)

    @cached_property
    def _scores_of_files(self):
        return read_score_files(self.args.reference_score_file, self.args.score_end_of_turn)

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

    # Loss

    def count_items(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor | int]:
        labels = inputs["labels"].masked_fill(inputs["scored_mask"] == ScoredMask.NOT_SCORED, -100)
        return {"samples": count_supervised_samples({**inputs, "labels": labels})}

    def compute_annotated_loss(self, batch: AnnotatedBatch) -> torch.Tensor:
        references = [batch.annotations[COLUMN.format(j)] for j in range(len(self._reference_names))]
        result = preference_loss(
            batch.log_probs,
            (batch.annotations["scored_mask"] == ScoredMask.SCORED) & batch.label_mask,
            batch.sample_ids,
            batch.num_samples,
            torch.stack(references) if references else batch.log_probs.new_empty(0, *batch.log_probs.shape),
            self.args.beta,
            self.args.gamma,
            self.args.preference_weighting,
        )
        batch.metrics.update(result.metrics(self._reference_names))
        return result.loss_sum / batch.num_items["samples"]
