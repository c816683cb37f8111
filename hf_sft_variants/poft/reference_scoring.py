"""Scores the responses of a data set with reference models, each with its own chat template and tokenizer."""

import hashlib
import os
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..base.fingerprints import fingerprint
from ..base.preparation import map_description
from ..base.trl_internals import get_config_model_id, global_then_local_main_first
from ..errors import InputError
from ..scoring import (
    EXAMPLE_KEY,
    LogProbScorer,
    cached_scores,
    identify_model,
    load_reference_model,
    load_reference_tokenizer,
    max_positions,
    require_same_vocabulary,
)
from .config import PoFTConfig
from .reference_rendering import label_scored_tokens, render_for_reference
from .score_files import SCHEMA


logger = get_logger(__name__)

# Increase this when the same model would yield different scores
_SCHEMA_VERSION = 1


class ReferenceScoringCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] that scores the data of a [`PoFTTrainer`] with reference models before
    training, while the trainer prepares the data.

    Each model reads the same messages with its own chat template and tokenizer, and is freed before the next one is
    loaded. Scores are cached on disk, keyed by the examples' content. When training starts, a summary line is logged
    for each data set and model. The trainer creates this callback from its configuration; pass your own to use other
    options.

    Example:

    ```python
    from datasets import load_dataset
    from hf_sft_variants import PoFTTrainer, ReferenceScoringCallback

    trainer = PoFTTrainer(
        "Qwen/Qwen2.5-0.5B",
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
        callbacks=[ReferenceScoringCallback(["Qwen/Qwen2.5-7B-Instruct", "01-ai/Yi-6B-Chat"])],
    )
    trainer.train()
    ```

    Args:
        models (`list[str]`):
            Ids or folders of causal language models or PEFT adapters. Their tokenizers may differ from the trained
            model's.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `from_pretrained` for all models. `dtype` defaults to bfloat16 on an accelerator and
            to float32 on the CPU.
        score_cache_dir (`str`, *optional*):
            Folder for all scores. Defaults to `hf_sft_variants/scores` in the Hugging Face home folder.
        batch_tokens (`int`, *optional*, defaults to `4096`):
            Maximum number of tokens in a batch, padding included.

    Attributes:
        scores (`dict[str, pa.Table]`):
            Maps the name of each data set to its scores, in the format of a score file (`docs/score_file.md`).
        key_of_row (`dict[str, dict[int, str]]`):
            Maps the name of each data set to the keys of its scored rows, by row number.
    """

    def __init__(
        self,
        models: list[str],
        model_init_kwargs: dict[str, Any] | None = None,
        score_cache_dir: str | None = None,
        batch_tokens: int = 4096,
    ):
        self.models = [models] if isinstance(models, str) else list(models)
        if not self.models or len(set(self.models)) < len(self.models):
            raise InputError(f"The reference models are {self.models}: pass at least one, and each only once.")
        self.model_init_kwargs = model_init_kwargs
        self.score_cache_dir = score_cache_dir
        self.batch_tokens = batch_tokens
        self.scores: dict[str, pa.Table] = {}
        self.key_of_row: dict[str, dict[int, str]] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        trained = get_config_model_id(model.config)
        for name in self.models:
            are_folders = os.path.isdir(name) and os.path.isdir(trained)
            if name == trained or (are_folders and fingerprint(name) == fingerprint(trained)):
                logger.warning(
                    f"The reference model {name!r} is also the model to train, so training starts with no margin over "
                    "it, and with τ = 0.5 if it is the only reference model."
                )
        for line in self.summary():
            logger.info(line)

    def summary(self) -> list[str]:
        """Return one line for each scored data set and model."""
        lines = []
        for name, table in self.scores.items():
            for model in self.models:
                scores = table.filter(pc.equal(table["model"], model))
                lines.append(
                    f"{model} on the {name} dataset: {pc.mean(scores['mean_log_prob']).as_py():.4f} nats per token on "
                    f"average over {pc.count(scores['num_tokens'])} examples, {pc.sum(scores['num_tokens'])} tokens"
                )
        return lines

    def score(
        self, dataset: Dataset, dataset_name: str, tokenizer: PreTrainedTokenizerBase, args: PoFTConfig
    ) -> pa.Table:
        """
        Score every example of a prepared data set with every model. If the rows have no responses, their tokens are
        scored. Must be called by all processes together.

        Returns:
            `pa.Table`: One row for each example and model, with null scores if the example is too long for the model.

        Raises:
            `InputError`: If a model can't be loaded, or can't render or score the data.
        """
        has_responses = dataset[0]["has_responses"]
        # Load all tokenizers first, so that a misspelled name fails before other models have scored for hours
        tokenizers = [load_reference_tokenizer(model, self.model_init_kwargs) for model in self.models]
        tables = []
        for model, own_tokenizer in zip(self.models, tokenizers, strict=True):
            render: Callable[..., dict[str, list[int]]]
            if has_responses:
                render, template = render_for_reference, own_tokenizer.chat_template
                fn_kwargs = {
                    "tokenizer": own_tokenizer,
                    "target_eos": tokenizer.eos_token or "",
                    "end_of_turn": args.score_end_of_turn,
                    "model": model,
                    "dataset_name": dataset_name,
                }
            else:
                require_same_vocabulary(model, tokenizer, self.model_init_kwargs)
                render, template, fn_kwargs = label_scored_tokens, None, {}
            map_kwargs = map_description(dataset, args, f"Rendering {dataset_name} dataset for {model}")
            others = [name for name in dataset.column_names if name != EXAMPLE_KEY]
            with global_then_local_main_first():
                rendered = dataset.map(render, fn_kwargs=fn_kwargs, remove_columns=others, **map_kwargs)
            tables.append(self._score_rendered(rendered, template, dataset_name, model, args))
        self.key_of_row[dataset_name] = dict(zip(dataset["example_row"], dataset[EXAMPLE_KEY], strict=True))
        self.scores[dataset_name] = pa.concat_tables(tables)
        return self.scores[dataset_name]

    def _score_rendered(self, rendered, template, dataset_name, model, args) -> pa.Table:
        """Cached by `settings` (the folder: model, template, end of turn) and by each example's tokens (the row)."""
        limits = [args.max_length, max_positions(model, self.model_init_kwargs)]
        settings = {
            "kind": "response_log_probs",
            "schema": _SCHEMA_VERSION,
            **identify_model(model, self.model_init_kwargs),
            "chat_template": hashlib.sha256(str(template).encode()).hexdigest()[:16],
            "score_end_of_turn": args.score_end_of_turn,
        }
        scores = cached_scores(
            rendered,
            lambda: LogProbScorer(load_reference_model(model, self.model_init_kwargs)),
            self.score_cache_dir,
            settings,
            self.batch_tokens,
            f"Scoring {dataset_name} dataset with {model}",
            max_tokens=min((limit for limit in limits if limit is not None), default=None),
        )
        columns = {
            EXAMPLE_KEY: rendered[EXAMPLE_KEY][:],
            "model": [model] * len(rendered),
            "sum_log_prob": scores["sum_log_prob"],
            "num_tokens": scores["num_tokens"],
            "mean_log_prob": pc.divide(scores["sum_log_prob"], scores["num_tokens"]),
            "score_end_of_turn": [args.score_end_of_turn] * len(rendered),
        }
        return pa.table(columns, schema=SCHEMA)
