import math
from dataclasses import dataclass, field
from typing import Any

from ..base.config import AnnotatedSFTConfig
from ..errors import InputError
from ..evaluation.tagged_answers import check_tags
from ..text.key_finder import check_pattern


FULL, KEY = "full", "key"


@dataclass
class SFTKeyConfig(AnnotatedSFTConfig):
    r"""
    Configuration class for the [`SFTKeyTrainer`].

    Lists only the parameters that [`AnnotatedSFTConfig`] does not have. Method: [SFTKey: emphasizing key answer
    tokens](https://huggingface.co/papers/2512.21017).

    Parameters that define the stages:
        stages (`list[str]`, *optional*, defaults to `["full", "key"]`):
            Loss of each stage: `"full"` for the whole response, or `"key"` for the answer alone. In the paper's terms,
            `["full"]` is SFT-Tag (or plain SFT), `["key"]` is Key-Tag, and `["full", "key"]` is SFTKey-Tag. As
            controls, `["full", "full"]` is SFT-Tag with the same compute and schedules, and `["key", "full"]` reverses
            the order.
        stage_fractions (`list[float]`, *optional*, defaults to `[0.5, 0.5]`):
            Share of the run's optimizer steps in each stage. The shares must sum to 1. `num_train_epochs` (or
            `max_steps`) covers all stages together. With a single stage, the default is `[1.0]`.
        stage_learning_rates (`list[float]`, *optional*):
            Peak learning rate of each stage. Defaults to `learning_rate` for all. Every stage has its own warm-up
            (`warmup_steps`) and schedule (`lr_scheduler_type`).
        reset_optimizer (`bool`, *optional*, defaults to `True`):
            Whether a new stage starts with a fresh optimizer state. The paper does not say.
        full_loss_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the full loss that is added to the key loss in a `"key"` stage so that the model does not forget
            the format: `key_loss + full_loss_weight * full_loss`, each a mean over its tokens. The paper uses 0.
        key_loss_weight (`float`, *optional*):
            Weight of the key tokens in a `"full"` stage, where other tokens have the weight 1; the loss is the
            weighted mean. With `stages=["full"]`, this is the one-stage control. By default, all weights are equal.

    Parameters that locate the key (by default, responses must be tagged):
        thinking_tags (`list[str]`, *optional*, defaults to `["<Thinking>", "</Thinking>"]`):
            Opening and closing tags of the reasoning, which is followed by white space and the answer in its own tags.
            The tags are plain text, not new tokens.
        answer_tags (`list[str]`, *optional*, defaults to `["<Answer>", "</Answer>"]`):
            Opening and closing tags of the answer.
        key_delimiter (`str`, *optional*):
            Text that precedes the key, such as `"####"`. It must occur exactly once in a response.
        key_pattern (`str`, *optional*):
            Regular expression with a group `key` that must match a response exactly once, for example
            `r"The answer is (?P<key>.+?)\."`, `r"</think>(?P<key>(?s:.*))"`, or, with nested braces,
            `r"\\boxed\{(?P<key>(?:[^{}]|(?P<braces>\{(?:[^{}]|(?&braces))*\}))*)\}"`. The syntax is that of the
            package `regex`.
        reasoning_column (`str`, *optional*):
            Column with the reasoning, to be set together with `answer_column`: the trainer combines the two into a
            tagged response and adds it to `prompt` or `messages`, replacing any existing response.
        answer_column (`str`, *optional*):
            Column with the answer.
        key_turns (`str`, *optional*, defaults to `"last"`):
            `"last"` looks for the key in the last assistant turn, `"all"` in every assistant turn, of which at least
            one must have a key. In tokenized rows (`input_ids`), assistant turns are those that begin with the header
            of the chat template. If none does, `"last"` takes the last turn with labels, and `"all"` requires the
            labels of the other turns to be -100.
        key_tags_in_loss (`bool`, *optional*, defaults to `True`):
            Whether a `"key"` stage also learns the text around the answer: the white space and the answer tags, or
            the delimiter. It always learns what follows the answer, up to and including the end-of-turn token.
        missing_key (`str`, *optional*, defaults to `"error"`):
            Whether an example with no key, or with more than one, is an `"error"` or is dropped and counted
            (`"drop"`). Examples whose key is cut off by `max_length` are always dropped and counted.

    Parameters that control reports on the accuracy of generated answers during training, off by default:
        answer_eval_steps (`int`, *optional*):
            Number of optimizer steps between two reports; the last report follows the last step. Requires an
            evaluation data set with the columns `prompt` and `answer_column` (or `answer`). Several data sets are
            reported separately. By default, there are no reports.
        answer_eval_samples (`int`, *optional*):
            Number of examples in each evaluation set for which to generate an answer, `per_device_eval_batch_size` at
            a time. Defaults to all.
        answer_eval_max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum length of a generated answer in tokens.
    """

    _MAY_CHANGE_ON_RESUME = ["answer_eval_steps", "answer_eval_samples", "answer_eval_max_new_tokens"]

    stages: list[str] = field(
        default_factory=lambda: [FULL, KEY],
        metadata={"help": "Loss of each stage: 'full' or 'key'."},
    )
    stage_fractions: list[float] = field(
        default_factory=lambda: [0.5, 0.5],
        metadata={"help": "Share of the run's optimizer steps in each stage."},
    )
    stage_learning_rates: list[float] | None = field(
        default=None,
        metadata={"help": "Peak learning rate of each stage; defaults to `learning_rate` for all."},
    )
    reset_optimizer: bool = field(
        default=True,
        metadata={"help": "Whether a new stage starts with a fresh optimizer state."},
    )
    full_loss_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the full loss that is added to the key loss in a 'key' stage."},
    )
    key_loss_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the key tokens in a 'full' stage, where other tokens have the weight 1."},
    )
    thinking_tags: list[str] = field(
        default_factory=lambda: ["<Thinking>", "</Thinking>"],
        metadata={"help": "Opening and closing tags of the reasoning."},
    )
    answer_tags: list[str] = field(
        default_factory=lambda: ["<Answer>", "</Answer>"],
        metadata={"help": "Opening and closing tags of the answer."},
    )
    key_delimiter: str | None = field(
        default=None,
        metadata={"help": "Text that precedes the key, such as '####'."},
    )
    key_pattern: str | None = field(
        default=None,
        metadata={"help": "Regular expression with a group `key` that matches the key."},
    )
    reasoning_column: str | None = field(
        default=None,
        metadata={"help": "Column with the reasoning, for a tagged response that the trainer assembles."},
    )
    answer_column: str | None = field(
        default=None,
        metadata={"help": "Column with the answer, for a tagged response that the trainer assembles."},
    )
    key_turns: str = field(
        default="last",
        metadata={"help": "Assistant turns to look for a key in.", "choices": ["last", "all"]},
    )
    key_tags_in_loss: bool = field(
        default=True,
        metadata={"help": "Whether a 'key' stage also learns the answer tags or the delimiter."},
    )
    missing_key: str = field(
        default="error",
        metadata={"help": "What to do with examples without a key, or with several.", "choices": ["error", "drop"]},
    )
    answer_eval_steps: int | None = field(
        default=None,
        metadata={"help": "Number of optimizer steps between two reports on generated answers; off by default."},
    )
    answer_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Number of examples in each evaluation set to generate answers for; all by default."},
    )
    answer_eval_max_new_tokens: int = field(
        default=256,
        metadata={"help": "Maximum length of a generated answer in tokens."},
    )

    @property
    def needs_keys(self) -> bool:
        """Whether the loss depends on where the key is."""
        return KEY in self.stages or self.key_loss_weight is not None

    def __post_init__(self) -> None:
        for name in ("stage_fractions", "stage_learning_rates"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, [_number(value) for value in getattr(self, name)])
        super().__post_init__()
        self._check_stages()
        self._check_key_source()
        for name in ("full_loss_weight", "key_loss_weight"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"`{name}` must be a number of 0 or more, got {value!r}.")
        for name in ("answer_eval_steps", "answer_eval_samples", "answer_eval_max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"`{name}` must be 1 or more, got {value}.")

    def _check_stages(self) -> None:
        unknown = [stage for stage in self.stages if stage not in (FULL, KEY)]
        if unknown or not self.stages:
            found = repr(unknown[0]) if unknown else "no stage"
            raise InputError(f"`stages` has {found}; it must be a list of 'full' and 'key', such as ['full', 'key'].")
        if len(self.stages) == 1 and self.stage_fractions == [0.5, 0.5]:
            self.stage_fractions = [1.0]
        fractions = self.stage_fractions
        if len(fractions) != len(self.stages):
            raise InputError(f"`stage_fractions={fractions}` must have one number for each stage of {self.stages}.")
        if min(fractions) <= 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
            raise InputError(f"`stage_fractions={fractions}` must be positive and sum to 1, not {sum(fractions):g}.")
        rates = self.stage_learning_rates
        if rates is not None and (len(rates) != len(self.stages) or not all(0 <= rate < math.inf for rate in rates)):
            raise InputError(
                f"`stage_learning_rates={rates}` must have one learning rate (0 or more) for each stage of "
                f"{self.stages}."
            )
        if rates is not None and self.learning_rate <= 0:
            raise InputError(
                f"`learning_rate={self.learning_rate}` must be positive with `stage_learning_rates`, because the "
                "rates of the stages are applied by scaling it."
            )
        for name, unused, stage in (("full_loss_weight", 0, KEY), ("key_loss_weight", None, FULL)):
            weight = getattr(self, name)
            if weight != unused and stage not in self.stages:
                raise InputError(
                    f"`{name}={weight}` only has an effect in a {stage!r} stage, but `stages` is {self.stages}. "
                    f"Remove it, or add a {stage!r} stage."
                )

    def _check_key_source(self) -> None:
        check_tags(self.thinking_tags, self.answer_tags)
        if (self.reasoning_column is None) != (self.answer_column is None):
            raise InputError(
                f"`reasoning_column={self.reasoning_column!r}` and `answer_column={self.answer_column!r}` must be set "
                "together: set both or neither."
            )
        sources = [name for name in ("key_delimiter", "key_pattern", "reasoning_column") if getattr(self, name)]
        if len(sources) > 1:
            raise InputError(f"`{sources[0]}` and `{sources[1]}` both say where the key is: set only one of them.")
        if self.key_delimiter is not None and not self.key_delimiter.strip():
            raise InputError(f"`key_delimiter={self.key_delimiter!r}` is blank: set it to the text before the key.")
        if self.key_pattern is not None:
            check_pattern("key_pattern", self.key_pattern)


def _number(value: Any) -> Any:
    """Convert a numeric string to a number, since YAML reads 5e-6 as a string. Other values are unchanged."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value
