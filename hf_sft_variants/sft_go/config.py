from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from ..base.field_checks import as_json_values, require_valid_fields
from ..errors import InputError


@dataclass
class SFTGOConfig(SFTConfig):
    r"""
    Configuration class for the [`SFTGOTrainer`].

    Only the parameters that [`~trl.SFTConfig`] does not have are listed. Method: [SFT-GO: supervised fine-tuning with
    group optimization](https://huggingface.co/papers/2506.15021).

    Parameters:
        group_by (`str`, *optional*, defaults to `"tfidf"`):
            What makes a token important:

            - `"tfidf"`: its TF-IDF weight, one document a sample's supervised tokens, one term a token id.
            - `"llmlingua2"`: the probability that a prompt compressor, `importance_model`, keeps its word.
            - `"rho1"`: how much worse the model is at it than `reference_model`, ranked anew at every step. The
              important group then always counts as the worst one, so `worst_group_weight=1` is
              [Rho-1](https://huggingface.co/papers/2404.07965).
            - `"column"`: the data set says it, by `importance_column` or `group_column`.

        important_fraction (`float`, *optional*, defaults to `0.5`):
            Share η of a sample's supervised tokens that form the important group, in (0, 1): `round(η·n)` tokens, at
            least 1 and at most `n - 1`, ties by position. The paper's value is not known to us.
        worst_group_weight (`float`, *optional*, defaults to `0.9`):
            Weight λ of the worst group's loss, in [0, 1]; the cross-entropy of all tokens weighs `1 - λ`. 0.9 is the
            paper's, 0 gives `SFTTrainer`'s loss.
        worst_group_schedule (`str`, *optional*, defaults to `"constant"`):
            How λ moves over the run to `worst_group_weight_end`: `"constant"` (not at all), `"linear"` or `"cosine"`.
            The paper mentions a schedule; its form is not known to us.
        worst_group_weight_end (`float`, *optional*, defaults to `0.0`):
            λ at the end of training, in [0, 1]. Not used by the `"constant"` schedule.
        group_scope (`str`, *optional*, defaults to `"sample"`):
            `"sample"` takes each sample's worst group, `"micro_batch"` the worst group of all tokens of a forward pass
            (the loss then depends on how the batch is split, by definition).
        sample_weighting (`str`, *optional*, defaults to `"tokens"`):
            `"tokens"` weighs a sample by its number of supervised tokens, as `SFTTrainer` does; `"uniform"` weighs all
            samples the same.
        min_grouped_tokens (`int`, *optional*, defaults to `10`):
            Samples with fewer supervised tokens are not grouped and have plain cross-entropy. Own group ids are not
            touched.
        special_tokens_important (`bool`, *optional*, defaults to `True`):
            Whether the tokenizer's special tokens (end of turn, end of sequence, role markers) come first among the
            important ones. Otherwise they are ranked by their scores like any other token, and may be left with little
            of the gradient: the model may not learn to stop.
        tfidf_file (`str`, *optional*):
            Where the fitted document frequencies are kept (`.npz`): read if the file is there, else fitted on the
            training set and written. Of a streaming training set they are fitted on the first 10,000 examples, unless
            the file is there. Inside `output_dir` it goes to the Hub with the model: a number for each token of the
            vocabulary.
        importance_model (`str`, *optional*, defaults to `"microsoft/llmlingua-2-xlm-roberta-large-meetingbank"`):
            For `group_by="llmlingua2"`: id or path of a token-classification model with two labels, 1 for "keep".
        reference_model (`str`, *optional*):
            For `group_by="rho1"`: id or path of a causal language model with the same tokenizer, or of an adapter. It
            scores the data once and is gone before training.
        reference_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `from_pretrained` for `reference_model`, such as `quantization_config`, or
            `device_map` for a model larger than one GPU. `dtype` defaults to bfloat16 on an accelerator, float32 on
            the CPU.
        score_cache_dir (`str`, *optional*):
            Folder where the scores of `importance_model` and `reference_model` are kept, a folder in it for each model
            and set of options. Defaults to `hf_sft_variants/scores` in the Hugging Face home folder.
            Other values of `important_fraction` use the same scores. A folder inside `output_dir` goes to the Hub with
            the model: hashes of the examples and a number for each token, no texts.
        score_batch_tokens (`int`, *optional*, defaults to `4096`):
            Most tokens in a batch when scoring, padding included.
        importance_column (`str`, *optional*):
            For `group_by="column"`: column with a score for each token of `input_ids`; the higher, the more important.
        group_column (`str`, *optional*):
            For `group_by="column"`: column with a group id for each token of `input_ids`: integers from 0, `-1` for
            tokens in no group (they count in the cross-entropy only). Of two groups, 1 is the important one.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "reference_model_init_kwargs"]
    _MAY_CHANGE_ON_RESUME = ["reference_model_init_kwargs", "score_cache_dir", "score_batch_tokens"]
    _FILES_AND_MODELS = ["reference_model", "importance_model", "tfidf_file"]

    group_by: str = field(
        default="tfidf",
        metadata={
            "help": "What makes a token important: TF-IDF, LLMLingua-2, excess loss, or a column of the data set.",
            "choices": ["tfidf", "llmlingua2", "rho1", "column"],
        },
    )
    important_fraction: float = field(
        default=0.5,
        metadata={"help": "Share of a sample's supervised tokens in the important group, in (0, 1)."},
    )
    worst_group_weight: float = field(
        default=0.9,
        metadata={"help": "Weight of the worst group's loss, in [0, 1]; 0 is SFTTrainer's loss."},
    )
    worst_group_schedule: str = field(
        default="constant",
        metadata={
            "help": "How worst_group_weight moves to worst_group_weight_end over the run.",
            "choices": ["constant", "linear", "cosine"],
        },
    )
    worst_group_weight_end: float = field(
        default=0.0,
        metadata={"help": "Weight of the worst group's loss at the end of training, in [0, 1]."},
    )
    group_scope: str = field(
        default="sample",
        metadata={
            "help": "Whether each sample or each micro-batch has its worst group.",
            "choices": ["sample", "micro_batch"],
        },
    )
    sample_weighting: str = field(
        default="tokens",
        metadata={
            "help": "Whether a sample weighs its number of supervised tokens, or all weigh the same.",
            "choices": ["tokens", "uniform"],
        },
    )
    min_grouped_tokens: int = field(
        default=10,
        metadata={"help": "Samples with fewer supervised tokens have plain cross-entropy."},
    )
    special_tokens_important: bool = field(
        default=True,
        metadata={"help": "Whether special tokens come first among the important ones."},
    )
    tfidf_file: str | None = field(
        default=None,
        metadata={
            "help": "File (.npz) with fitted document frequencies: read if it is there, else fitted and written."
        },
    )
    importance_model: str = field(
        default="microsoft/llmlingua-2-xlm-roberta-large-meetingbank",
        metadata={"help": "For group_by='llmlingua2': id or path of a token-classification model."},
    )
    reference_model: str | None = field(
        default=None,
        metadata={"help": "For group_by='rho1': id or path of a causal language model with the same tokenizer."},
    )
    reference_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `from_pretrained` for the reference model."},
    )
    score_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for scores; by default `hf_sft_variants/scores` in the Hugging Face home folder."},
    )
    score_batch_tokens: int = field(
        default=4096,
        metadata={"help": "Most tokens in a batch when scoring, padding included."},
    )
    importance_column: str | None = field(
        default=None,
        metadata={"help": "For group_by='column': column with a score for each token of input_ids."},
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "For group_by='column': column with a group id for each token of input_ids."},
    )

    def __post_init__(self):
        super().__post_init__()
        require_valid_fields(self)
        for name in ("important_fraction", "worst_group_weight", "worst_group_weight_end"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InputError(f"`{name}` must be a number between 0 and 1, got {value!r}.")
        if self.important_fraction in (0, 1):
            raise InputError(
                f"`important_fraction` must lie between 0 and 1, both excluded, got {self.important_fraction}. For "
                "SFTTrainer's loss on all tokens set `worst_group_weight=0`."
            )
        if self.min_grouped_tokens < 0:
            raise InputError(f"`min_grouped_tokens` must be 0 or more, got {self.min_grouped_tokens}.")
        if self.score_batch_tokens < 1:
            raise InputError(f"`score_batch_tokens` must be 1 or more, got {self.score_batch_tokens}.")
        if self.group_by == "rho1" and self.reference_model is None:
            raise InputError("`group_by='rho1'` needs `reference_model`: the id or path of a causal language model.")
        self._check_columns()

    def to_dict(self):
        """As [`~trl.SFTConfig.to_dict`], from which trackers take the settings: a quantization, too, is JSON."""
        kwargs = as_json_values(self.reference_model_init_kwargs)
        return {**super().to_dict(), "reference_model_init_kwargs": kwargs}

    def _check_columns(self) -> None:
        columns = [name for name in ("importance_column", "group_column") if getattr(self, name) is not None]
        if self.group_by == "column" and len(columns) != 1:
            given = "both" if columns else "neither"
            raise InputError(
                "`group_by='column'` needs `importance_column` (own scores) or `group_column` (own group ids), one of "
                f"them; got {given}."
            )
        if self.group_by != "column" and columns:
            raise InputError(
                f"`{columns[0]}={getattr(self, columns[0])!r}` is used with `group_by='column'` only, but `group_by` "
                f"is {self.group_by!r}. Set `group_by='column'` or remove `{columns[0]}`."
            )
        if self.group_by != "tfidf" and self.tfidf_file is not None:
            raise InputError(f"`tfidf_file={self.tfidf_file!r}` is used with `group_by='tfidf'` only; remove it.")
        for name in ("reference_model", "reference_model_init_kwargs"):
            if self.group_by != "rho1" and getattr(self, name) is not None:
                raise InputError(f"`{name}={getattr(self, name)!r}` is used with `group_by='rho1'` only; remove it.")
