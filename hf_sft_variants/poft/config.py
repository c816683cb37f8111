import math
from dataclasses import dataclass, field
from typing import Any

from ..base.config import AnnotatedSFTConfig
from ..base.field_checks import as_json_values
from ..errors import InputError


@dataclass
class PoFTConfig(AnnotatedSFTConfig):
    r"""
    Configuration class for the [`PoFTTrainer`].

    Lists only the parameters that [`AnnotatedSFTConfig`] does not have. Method: [PoFT: preference-oriented supervised
    fine-tuning](https://huggingface.co/papers/2412.12865).

    Parameters that define the loss:
        beta (`float`, *optional*, defaults to `1.0`):
            β > 0: how sharply an example's weight falls with its margin over the reference models. The paper uses 1.
        gamma (`float`, *optional*, defaults to `0.0`):
            γ, added to the margin. The paper uses 0.
        length_normalizer (`str`, *optional*, defaults to `"own"`):
            Divisor of a reference model's log-probability of a response: `"own"` is its own number of tokens, as in
            the paper; `"target"` is the trained model's, which makes models with different tokenizers comparable.
        score_end_of_turn (`bool`, *optional*, defaults to `True`):
            Whether the end-of-turn token is scored, by all models, and trained on.
        preference_weighting (`str`, *optional*, defaults to `"poft"`):
            Weight of an example's cross-entropy:

            - `"poft"`: β·τ, with τ from the margin.
            - `"uniform"`: 1. A control that needs no reference model and allows every packing strategy. It truncates
              as `SFTTrainer` does; if packing cuts an example, each part counts as an example.
            - `"constant"`: β·σ(-γ), as for an example without margin. A control on the same examples as `"poft"`.

    Parameters of the reference log-probabilities, which have one of three sources:
        reference_models (`list[str]`, *optional*):
            Ids or folders of chat models or PEFT adapters, with any tokenizers. They score the data once, each in its
            own chat template, and are freed before training.
        reference_score_file (`list[str]`, *optional*):
            Files with scores made elsewhere (`hf-sft-variants score --output`, or your own, see `docs/score_file.md`).
            `reference_models` selects some of their models; all are used by default.
        reference_score_column (`str`, *optional*, defaults to `"ref_logps"`):
            Column of the data set with a list of mean log-probabilities, one per reference model, in nats per token.
            A data set with this column is not scored.

    Parameters of scoring:
        score_cache_dir (`str`, *optional*):
            Folder for scores, with a subfolder for each model and its options. Defaults to `hf_sft_variants/scores` in
            the Hugging Face home folder. A folder inside `output_dir` is pushed to the Hub with the model; it contains
            hashes of the examples and numbers, but no text.
        reference_batch_tokens (`int`, *optional*, defaults to `4096`):
            Maximum number of tokens in a batch when scoring, padding included.
        reference_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `from_pretrained` for the reference models, such as `quantization_config`, or
            `device_map` for models larger than one GPU. `dtype` defaults to bfloat16 on an accelerator, float32 on the
            CPU. An adapter's base model defaults to the revision that the adapter was saved with.
    """

    _VALID_DICT_FIELDS = [*AnnotatedSFTConfig._VALID_DICT_FIELDS, "reference_model_init_kwargs"]
    _MAY_CHANGE_ON_RESUME = ["reference_model_init_kwargs", "score_cache_dir", "reference_batch_tokens"]
    _FILES_AND_MODELS = ["reference_models", "reference_score_file"]

    beta: float = field(
        default=1.0,
        metadata={"help": "How sharply an example's weight falls with its margin; positive."},
    )
    gamma: float = field(
        default=0.0,
        metadata={"help": "Added to the margin."},
    )
    reference_models: list[str] | None = field(
        default=None,
        metadata={"help": "Ids or folders of the reference models."},
    )
    reference_score_column: str = field(
        default="ref_logps",
        metadata={"help": "Column with one mean log-probability per reference model; replaces scoring."},
    )
    reference_score_file: list[str] | None = field(
        default=None,
        metadata={"help": "Files with scores made elsewhere, .parquet or .jsonl."},
    )
    length_normalizer: str = field(
        default="own",
        metadata={
            "help": "Whether to divide a reference model's log-probability by its own or the target's token count.",
            "choices": ["own", "target"],
        },
    )
    score_end_of_turn: bool = field(
        default=True,
        metadata={"help": "Whether the end-of-turn token is scored."},
    )
    preference_weighting: str = field(
        default="poft",
        metadata={
            "help": "Weight of an example's cross-entropy; 'uniform' and 'constant' are controls.",
            "choices": ["poft", "uniform", "constant"],
        },
    )
    score_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for scores; by default `hf_sft_variants/scores` in the Hugging Face home folder."},
    )
    reference_batch_tokens: int = field(
        default=4096,
        metadata={"help": "Maximum number of tokens in a batch when scoring, padding included."},
    )
    reference_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `from_pretrained` for the reference models."},
    )

    @property
    def needs_references(self) -> bool:
        """Whether the loss needs reference log-probabilities, or the examples that have them."""
        return self.preference_weighting != "uniform"

    def __post_init__(self) -> None:
        for name in ("reference_models", "reference_score_file"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        super().__post_init__()
        if not 0 < self.beta < math.inf:
            raise InputError(f"`beta` must be a positive number, got {self.beta!r}.")
        if not math.isfinite(self.gamma):
            raise InputError(f"`gamma` must be a finite number, got {self.gamma!r}.")
        if self.reference_batch_tokens < 1:
            raise InputError(f"`reference_batch_tokens` must be 1 or more, got {self.reference_batch_tokens}.")
        if self.reference_models is not None and len(set(self.reference_models)) < len(self.reference_models):
            raise InputError(f"`reference_models={self.reference_models}` has a model twice; give each once.")
        self._check_cuts()

    def to_dict(self) -> dict[str, Any]:
        """As [`~trl.SFTConfig.to_dict`], with JSON values for trackers, also of a quantization."""
        kwargs = as_json_values(self.reference_model_init_kwargs)
        return {**super().to_dict(), "reference_model_init_kwargs": kwargs}

    def _check_cuts(self) -> None:
        if self.truncation_mode == "keep_end" and self.needs_references:
            raise InputError(
                "`truncation_mode='keep_end'` cuts prompts, which the reference models read whole. Use "
                "`truncation_mode='keep_start'`, which drops examples whose response is cut, or the control "
                "`preference_weighting='uniform'`."
            )
        packs = self.packing or self.eval_packing
        if packs and self.needs_references and self.packing_strategy != "bfd":
            raise InputError(
                f"`packing_strategy={self.packing_strategy!r}` cuts examples, and a part of an example can't be "
                "compared with a reference model's score of the whole. Use `packing_strategy='bfd'`, or the control "
                "`preference_weighting='uniform'`."
            )
