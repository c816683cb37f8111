import math
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from ..base.field_checks import as_json_values, require_valid_fields
from ..errors import InputError


@dataclass
class PoFTConfig(SFTConfig):
    r"""
    Configuration class for the [`PoFTTrainer`].

    Only the parameters that [`~trl.SFTConfig`] does not have are listed. Method: [PoFT: preference-oriented supervised
    fine-tuning](https://huggingface.co/papers/2412.12865).

    Parameters that define the loss:
        beta (`float`, *optional*, defaults to `1.0`):
            β > 0, how sharply an example's weight falls with its margin over the reference models. 1 is the paper's.
        gamma (`float`, *optional*, defaults to `0.0`):
            γ, added to the margin. 0 is the paper's.
        length_normalizer (`str`, *optional*, defaults to `"own"`):
            `"own"` divides a reference model's log-probability of a response by its own number of tokens, as the paper
            does; `"target"` by the trained model's, so that the models' tokenizers make no difference.
        score_end_of_turn (`bool`, *optional*, defaults to `True`):
            Whether the end-of-turn token counts, in all models alike. Otherwise it is not trained either.
        preference_weighting (`str`, *optional*, defaults to `"poft"`):
            What an example's cross-entropy weighs:

            - `"poft"`: β·τ, with τ from the margin.
            - `"uniform"`: 1. A control that needs no reference model and allows every packing; it truncates as
              `SFTTrainer` does, and where a packing cuts examples, their parts count as examples.
            - `"constant"`: β·σ(-γ), the τ of an example without margin. A control on the same data as `"poft"`.

    Parameters that say where the reference models' log-probabilities come from, one of three:
        reference_models (`list[str]`, *optional*):
            Ids or folders of chat models or PEFT adapters, with any tokenizers. They score the data once, each in its
            own chat template, and are gone before training.
        reference_score_file (`list[str]`, *optional*):
            Files of scores made elsewhere (`hf-sft-variants score --output`, or your own, see `docs/score_file.md`).
            Of their models those in `reference_models` are used, by default all.
        reference_score_column (`str`, *optional*, defaults to `"ref_logps"`):
            Column of the data set with a list of one mean log-probability per reference model, in nats per token. If
            it is there, nothing is scored.

    Parameters of scoring:
        score_cache_dir (`str`, *optional*):
            Folder where scores are kept, a folder in it for each model and set of options. Defaults to
            `hf_sft_variants/scores` in the Hugging Face home folder. A folder inside `output_dir` goes to the Hub with
            the model: hashes of the examples and numbers, no texts.
        reference_batch_tokens (`int`, *optional*, defaults to `4096`):
            Most tokens in a batch when scoring, padding included.
        reference_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `from_pretrained` for the reference models, such as `quantization_config`, or
            `device_map` for models larger than one GPU. `dtype` defaults to bfloat16 on an accelerator, float32 on the
            CPU. The base model of an adapter has the revision that the adapter was saved with.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "reference_model_init_kwargs"]
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
        metadata={"help": "Column with one mean log-probability per reference model; if there, nothing is scored."},
    )
    reference_score_file: list[str] | None = field(
        default=None,
        metadata={"help": "Files of scores made elsewhere, .parquet or .jsonl."},
    )
    length_normalizer: str = field(
        default="own",
        metadata={
            "help": "Whether a reference model's log-probability is divided by its own or the target's token count.",
            "choices": ["own", "target"],
        },
    )
    score_end_of_turn: bool = field(
        default=True,
        metadata={"help": "Whether the end-of-turn token counts."},
    )
    preference_weighting: str = field(
        default="poft",
        metadata={
            "help": "What an example's cross-entropy weighs; 'uniform' and 'constant' are controls.",
            "choices": ["poft", "uniform", "constant"],
        },
    )
    score_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for scores; by default `hf_sft_variants/scores` in the Hugging Face home folder."},
    )
    reference_batch_tokens: int = field(
        default=4096,
        metadata={"help": "Most tokens in a batch when scoring, padding included."},
    )
    reference_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `from_pretrained` for the reference models."},
    )

    @property
    def needs_references(self) -> bool:
        """Whether the loss compares with reference models, or is to be trained on the same examples."""
        return self.preference_weighting != "uniform"

    def __post_init__(self):
        super().__post_init__()
        for name in ("reference_models", "reference_score_file"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        require_valid_fields(self)
        for name in ("beta", "gamma"):
            value = getattr(self, name)
            if not math.isfinite(value) or (name == "beta" and value <= 0):
                wanted = "a positive number" if name == "beta" else "a finite number"
                raise InputError(f"`{name}` must be {wanted}, got {value!r}.")
        if self.reference_batch_tokens < 1:
            raise InputError(f"`reference_batch_tokens` must be 1 or more, got {self.reference_batch_tokens}.")
        if self.reference_models is not None and len(set(self.reference_models)) < len(self.reference_models):
            raise InputError(f"`reference_models={self.reference_models}` has a model twice; give each once.")
        self._check_cuts()

    def to_dict(self):
        """As [`~trl.SFTConfig.to_dict`], from which trackers take the settings: a quantization, too, is JSON."""
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
