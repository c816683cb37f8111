from dataclasses import dataclass, field
from typing import Any

from ..base.config import AnnotatedSFTConfig
from ..base.field_checks import as_json_values
from ..errors import InputError


# Fields that have no effect with another `group_by`
_USED_WITH = {
    "tfidf_file": "tfidf",
    "reference_model": "rho1",
    "reference_model_init_kwargs": "rho1",
    "importance_column": "column",
    "group_column": "column",
}


@dataclass
class SFTGOConfig(AnnotatedSFTConfig):
    r"""
    Configuration class for the [`SFTGOTrainer`].

    Lists only the parameters that [`AnnotatedSFTConfig`] does not have. Method: [SFT-GO: supervised fine-tuning with
    group optimization](https://huggingface.co/papers/2506.15021).

    Parameters:
        group_by (`str`, *optional*, defaults to `"tfidf"`):
            Criterion for the importance of a token:

            - `"tfidf"`: its TF-IDF weight, where a document is a sample's supervised tokens and a term is a token id.
            - `"llmlingua2"`: the probability that the prompt compressor `importance_model` keeps the token's word.
            - `"rho1"`: its excess loss over `reference_model`, ranked again at every step. The important group then
              always counts as the worst one, so `worst_group_weight=1` is
              [Rho-1](https://huggingface.co/papers/2404.07965).
            - `"column"`: a column of the data set, named by `importance_column` or `group_column`.

        important_fraction (`float`, *optional*, defaults to `0.5`):
            Share η of a sample's supervised tokens that form the important group, in (0, 1): `round(η·n)` tokens, at
            least 1 and at most `n - 1`, with ties broken by position. We don't know the paper's value.
        worst_group_weight (`float`, *optional*, defaults to `0.9`):
            Weight λ of the worst group's loss, in [0, 1]; the cross-entropy over all tokens has the weight `1 - λ`.
            The paper uses 0.9; 0 gives `SFTTrainer`'s loss.
        worst_group_schedule (`str`, *optional*, defaults to `"constant"`):
            How λ changes to `worst_group_weight_end` over the run: `"constant"` (not at all), `"linear"` or
            `"cosine"`. The paper mentions a schedule, but we don't know its form.
        worst_group_weight_end (`float`, *optional*, defaults to `0.0`):
            λ at the end of training, in [0, 1]. Ignored by the `"constant"` schedule.
        group_scope (`str`, *optional*, defaults to `"sample"`):
            `"sample"` takes the worst group of each sample, `"micro_batch"` the worst group over all tokens of a
            forward pass, so that the loss depends on how the batch is split.
        sample_weighting (`str`, *optional*, defaults to `"tokens"`):
            `"tokens"` weights a sample by its number of supervised tokens, as `SFTTrainer` does; `"uniform"` weights
            all samples equally.
        min_grouped_tokens (`int`, *optional*, defaults to `10`):
            Samples with fewer supervised tokens are not grouped; their loss is plain cross-entropy. Does not apply to
            `group_column`.
        special_tokens_important (`bool`, *optional*, defaults to `True`):
            Whether the tokenizer's special tokens (end of turn, end of sequence, role markers) rank as the most
            important ones. Otherwise they are ranked by their scores like any other token; they may then get little of
            the gradient, and the model may not learn to stop.
        tfidf_file (`str`, *optional*):
            File (`.npz`) with the document frequencies, one number for each token of the vocabulary. It is read if it
            exists; otherwise the frequencies are fitted on the training set (for a stream, on its first 10,000
            examples) and written to it. A file inside `output_dir` is pushed to the Hub with the model.
        importance_model (`str`, *optional*, defaults to `"microsoft/llmlingua-2-xlm-roberta-large-meetingbank"`):
            For `group_by="llmlingua2"`: id or path of a token-classification model with two labels, 1 for "keep".
        reference_model (`str`, *optional*):
            For `group_by="rho1"`: id or path of a causal language model with the same tokenizer, or of an adapter. It
            scores the data once before training.
        reference_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `from_pretrained` for `reference_model`, such as `quantization_config`, or
            `device_map` for a model larger than one GPU. `dtype` defaults to bfloat16 on an accelerator, float32 on
            the CPU.
        score_cache_dir (`str`, *optional*):
            Folder for the scores of `importance_model` and `reference_model`, which can be reused with any
            `important_fraction`. Defaults to `hf_sft_variants/scores` in the Hugging Face home folder. A folder inside
            `output_dir` is pushed to the Hub with the model; it has hashes of the examples and a number for each
            token, but no text.
        score_batch_tokens (`int`, *optional*, defaults to `4096`):
            Maximum number of tokens in a batch when scoring, including padding.
        importance_column (`str`, *optional*):
            For `group_by="column"`: column with a score for each token of `input_ids`, higher for more important
            tokens.
        group_column (`str`, *optional*):
            For `group_by="column"`: column with a group id for each token of `input_ids`: an integer from 0 on, or
            `-1` for tokens without a group, which only count in the cross-entropy.
    """

    _VALID_DICT_FIELDS = [*AnnotatedSFTConfig._VALID_DICT_FIELDS, "reference_model_init_kwargs"]
    _MAY_CHANGE_ON_RESUME = ["reference_model_init_kwargs", "score_cache_dir", "score_batch_tokens"]
    _FILES_AND_MODELS = ["reference_model", "importance_model", "tfidf_file"]

    group_by: str = field(
        default="tfidf",
        metadata={
            "help": "Criterion for the importance of a token: TF-IDF, LLMLingua-2, excess loss, or a column.",
            "choices": ["tfidf", "llmlingua2", "rho1", "column"],
        },
    )
    important_fraction: float = field(
        default=0.5,
        metadata={"help": "Share of a sample's supervised tokens in the important group, in (0, 1)."},
    )
    worst_group_weight: float = field(
        default=0.9,
        metadata={"help": "Weight of the worst group's loss, in [0, 1]; 0 gives SFTTrainer's loss."},
    )
    worst_group_schedule: str = field(
        default="constant",
        metadata={
            "help": "How worst_group_weight changes to worst_group_weight_end over the run.",
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
            "help": "Whether the worst group is chosen per sample or per micro-batch.",
            "choices": ["sample", "micro_batch"],
        },
    )
    sample_weighting: str = field(
        default="tokens",
        metadata={
            "help": "Whether to weight samples by their number of supervised tokens or equally.",
            "choices": ["tokens", "uniform"],
        },
    )
    min_grouped_tokens: int = field(
        default=10,
        metadata={"help": "Samples with fewer supervised tokens are not grouped; their loss is plain cross-entropy."},
    )
    special_tokens_important: bool = field(
        default=True,
        metadata={"help": "Whether special tokens rank as the most important ones."},
    )
    tfidf_file: str | None = field(
        default=None,
        metadata={"help": "File (.npz) with document frequencies: read if it exists, otherwise fitted and written."},
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
        metadata={"help": "Maximum number of tokens in a batch when scoring, including padding."},
    )
    importance_column: str | None = field(
        default=None,
        metadata={"help": "For group_by='column': column with a score for each token of input_ids."},
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "For group_by='column': column with a group id for each token of input_ids."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("important_fraction", "worst_group_weight", "worst_group_weight_end"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InputError(f"`{name}` must be a number between 0 and 1, got {value!r}.")
        if self.important_fraction in (0, 1):
            raise InputError(
                f"`important_fraction` must be between 0 and 1, exclusive, got {self.important_fraction}. For "
                "SFTTrainer's loss on all tokens, set `worst_group_weight=0`."
            )
        if self.min_grouped_tokens < 0:
            raise InputError(f"`min_grouped_tokens` must be 0 or more, got {self.min_grouped_tokens}.")
        if self.score_batch_tokens < 1:
            raise InputError(f"`score_batch_tokens` must be 1 or more, got {self.score_batch_tokens}.")
        self._check_grouping()

    def to_dict(self) -> dict[str, Any]:
        """Like [`~trl.SFTConfig.to_dict`], but with `reference_model_init_kwargs` as JSON values, for trackers."""
        kwargs = as_json_values(self.reference_model_init_kwargs)
        return {**super().to_dict(), "reference_model_init_kwargs": kwargs}

    def _check_grouping(self) -> None:
        for name, group_by in _USED_WITH.items():
            value = getattr(self, name)
            if value is not None and self.group_by != group_by:
                raise InputError(
                    f"`{name}={value!r}` is only used with `group_by={group_by!r}`, but `group_by` is "
                    f"{self.group_by!r}. Set `group_by={group_by!r}` or remove `{name}`."
                )
        if self.group_by == "rho1" and self.reference_model is None:
            raise InputError("`group_by='rho1'` needs `reference_model`: the id or path of a causal language model.")
        if self.group_by == "column" and (self.importance_column is None) == (self.group_column is None):
            given = "neither" if self.group_column is None else "both"
            raise InputError(
                "`group_by='column'` needs either `importance_column` (your own scores) or `group_column` (your own "
                f"group ids), got {given}."
            )
