import math
from dataclasses import dataclass, field
from typing import Any

import regex
from trl import SFTConfig

from ..base.field_checks import require_valid_fields
from ..errors import InputError
from ..evaluation.tagged_answers import check_tags


FULL, KEY = "full", "key"


@dataclass
class SFTKeyConfig(SFTConfig):
    r"""
    Configuration class for the [`SFTKeyTrainer`].

    Only the parameters that [`~trl.SFTConfig`] does not have are listed. Method: [SFTKey: emphasizing key answer
    tokens](https://huggingface.co/papers/2512.21017).

    Parameters that define the stages:
        stages (`list[str]`, *optional*, defaults to `["full", "key"]`):
            What is in the loss of each stage: `"full"`, the whole response, or `"key"`, the answer alone. The paper's
            arms: `["full"]` is SFT-Tag (or plain SFT), `["key"]` Key-Tag, `["full", "key"]` SFTKey-Tag. Controls:
            `["full", "full"]` is SFT-Tag with the same compute and schedules, `["key", "full"]` the reversed order.
        stage_fractions (`list[float]`, *optional*, defaults to `[0.5, 0.5]`):
            Share of the run's optimizer steps that each stage has; they sum to 1. `num_train_epochs` (or `max_steps`)
            is the total of all stages. A single stage has all steps, whatever stands here by default.
        stage_learning_rates (`list[float]`, *optional*):
            Peak learning rate of each stage. Defaults to `learning_rate` in each. Every stage has its own warm-up
            (`warmup_steps`) and its own schedule of `lr_scheduler_type`.
        reset_optimizer (`bool`, *optional*, defaults to `True`):
            Whether a new stage begins with a fresh optimizer state. The paper does not say.
        full_loss_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the full loss that is added to the key loss in a `"key"` stage, against forgetting the format:
            `key_loss + full_loss_weight * full_loss`, each a mean over its tokens. 0 is the paper's.
        key_loss_weight (`float`, *optional*):
            Weight of the key tokens in a `"full"` stage, where all other tokens weigh 1; the loss is the weighted
            mean. With `stages=["full"]` this is the one-stage control. By default all tokens weigh the same.

    Parameters that say where the key is; without any of them responses are tagged:
        thinking_tags (`list[str]`, *optional*, defaults to `["<Thinking>", "</Thinking>"]`):
            Opening and closing tag of the reasoning, which comes first, then white space, then the answer in its tags.
            Plain text, no new tokens.
        answer_tags (`list[str]`, *optional*, defaults to `["<Answer>", "</Answer>"]`):
            Opening and closing tag of the answer.
        key_delimiter (`str`, *optional*):
            The key is what follows this text, such as `"####"`, which must stand in a response once.
        key_pattern (`str`, *optional*):
            Regular expression with a group `key`, which must match a response once, for example
            `r"The answer is (?P<key>.+?)\."`, `r"</think>(?P<key>(?s:.*))"`, or, with nested braces,
            `r"\\boxed\{(?P<key>(?:[^{}]|(?P<braces>\{(?:[^{}]|(?&braces))*\}))*)\}"`. Syntax of the module `regex`.
        reasoning_column (`str`, *optional*):
            Column with the reasoning, given together with `answer_column`: the trainer makes the tagged response of
            the two, behind `prompt` or behind `messages`. A response that is there already is replaced.
        answer_column (`str`, *optional*):
            Column with the answer.
        key_turns (`str`, *optional*, defaults to `"last"`):
            Of several assistant turns, whether the `"last"` one has the key, or `"all"` may have one (at least one
            must). Among tokens (`input_ids`) a turn is the assistant's if it begins as the chat template has it. Where
            none does, `"last"` takes the last turn with labels, and `"all"` needs labels that are -100 on the others.
        key_tags_in_loss (`bool`, *optional*, defaults to `True`):
            Whether a `"key"` stage learns the text around the answer too: the white space and the answer tags, or the
            delimiter. What follows the answer, up to and with the end-of-turn token, is always learned.
        missing_key (`str`, *optional*, defaults to `"error"`):
            What happens to an example without a key, or with two: `"error"`, or `"drop"`, which says how many.
            Examples whose key is cut by `max_length` are dropped and counted either way.

    Parameters that report the accuracy of generated answers during training, off by default:
        answer_eval_steps (`int`, *optional*):
            Number of optimizer steps between two reports; one is made at the end, too. Needs an evaluation data set
            with the columns `prompt` and `answer_column` (or `answer`); of several, each has reports of its own. By
            default there are none.
        answer_eval_samples (`int`, *optional*):
            Number of evaluation samples that are answered, of each set. By default all.
        answer_eval_max_new_tokens (`int`, *optional*, defaults to `256`):
            Where a generated answer is cut.
        answer_eval_batch_size (`int`, *optional*, defaults to `16`):
            Prompts that a process answers at once.
    """

    _MAY_CHANGE_ON_RESUME = [
        "answer_eval_steps",
        "answer_eval_samples",
        "answer_eval_max_new_tokens",
        "answer_eval_batch_size",
    ]

    stages: list[str] = field(
        default_factory=lambda: [FULL, KEY],
        metadata={"help": "What is in the loss of each stage: 'full' or 'key'."},
    )
    stage_fractions: list[float] = field(
        default_factory=lambda: [0.5, 0.5],
        metadata={"help": "Share of the run's optimizer steps that each stage has."},
    )
    stage_learning_rates: list[float] | None = field(
        default=None,
        metadata={"help": "Peak learning rate of each stage; by default `learning_rate` in each."},
    )
    reset_optimizer: bool = field(
        default=True,
        metadata={"help": "Whether a new stage begins with a fresh optimizer state."},
    )
    full_loss_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the full loss that is added to the key loss in a 'key' stage."},
    )
    key_loss_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the key tokens in a 'full' stage, where other tokens weigh 1."},
    )
    thinking_tags: list[str] = field(
        default_factory=lambda: ["<Thinking>", "</Thinking>"],
        metadata={"help": "Opening and closing tag of the reasoning."},
    )
    answer_tags: list[str] = field(
        default_factory=lambda: ["<Answer>", "</Answer>"],
        metadata={"help": "Opening and closing tag of the answer."},
    )
    key_delimiter: str | None = field(
        default=None,
        metadata={"help": "The key is what follows this text, such as '####'."},
    )
    key_pattern: str | None = field(
        default=None,
        metadata={"help": "Regular expression with a group `key`."},
    )
    reasoning_column: str | None = field(
        default=None,
        metadata={"help": "Column with the reasoning, of which the trainer makes a tagged response."},
    )
    answer_column: str | None = field(
        default=None,
        metadata={"help": "Column with the answer, of which the trainer makes a tagged response."},
    )
    key_turns: str = field(
        default="last",
        metadata={"help": "Which of several assistant turns have a key.", "choices": ["last", "all"]},
    )
    key_tags_in_loss: bool = field(
        default=True,
        metadata={"help": "Whether a 'key' stage learns the answer's tags, or the delimiter, too."},
    )
    missing_key: str = field(
        default="error",
        metadata={"help": "What happens to an example without a key, or with two.", "choices": ["error", "drop"]},
    )
    answer_eval_steps: int | None = field(
        default=None,
        metadata={"help": "Number of optimizer steps between two reports on generated answers; none by default."},
    )
    answer_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Number of evaluation samples that are answered, of each set; all by default."},
    )
    answer_eval_max_new_tokens: int = field(
        default=256,
        metadata={"help": "Where a generated answer is cut."},
    )
    answer_eval_batch_size: int = field(
        default=16,
        metadata={"help": "Prompts that a process answers at once."},
    )

    @property
    def needs_keys(self) -> bool:
        """Whether the loss depends on where the key is."""
        return KEY in self.stages or self.key_loss_weight is not None

    def __post_init__(self):
        super().__post_init__()
        for name in ("stage_fractions", "stage_learning_rates"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, [_number(value) for value in getattr(self, name)])
        require_valid_fields(self)
        self._check_stages()
        self._check_key_source()
        for name in ("full_loss_weight", "key_loss_weight"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"`{name}` must be a number of 0 or more, got {value!r}.")
        for name in (
            "answer_eval_steps",
            "answer_eval_samples",
            "answer_eval_max_new_tokens",
            "answer_eval_batch_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"`{name}` must be 1 or more, got {value}.")

    def _check_stages(self) -> None:
        unknown = [stage for stage in self.stages if stage not in (FULL, KEY)]
        if unknown or not self.stages:
            found = repr(unknown[0]) if unknown else "no stage"
            raise InputError(f"`stages` has {found}; give a list of 'full' and 'key', such as ['full', 'key'].")
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
                f"`stage_learning_rates={rates}` must have one learning rate, 0 or more, for each stage of "
                f"{self.stages}."
            )
        if rates is not None and self.learning_rate <= 0:
            raise InputError(
                f"`learning_rate={self.learning_rate}` must be positive with `stage_learning_rates`, which are set in "
                "relation to it."
            )
        if self.full_loss_weight > 0 and KEY not in self.stages:
            raise InputError(
                f"`full_loss_weight={self.full_loss_weight}` has an effect in a 'key' stage only, but `stages` is "
                f"{self.stages}. Remove it, or add a 'key' stage."
            )
        if self.key_loss_weight is not None and FULL not in self.stages:
            raise InputError(
                f"`key_loss_weight={self.key_loss_weight}` has an effect in a 'full' stage only, but `stages` is "
                f"{self.stages}. Remove it, or add a 'full' stage."
            )

    def _check_key_source(self) -> None:
        check_tags(self.thinking_tags, self.answer_tags)
        if (self.reasoning_column is None) != (self.answer_column is None):
            raise InputError(
                f"`reasoning_column={self.reasoning_column!r}` and `answer_column={self.answer_column!r}` belong "
                "together: give both, or neither."
            )
        sources = [name for name in ("key_delimiter", "key_pattern", "reasoning_column") if getattr(self, name)]
        if len(sources) > 1:
            raise InputError(f"`{sources[0]}` and `{sources[1]}` both say where the key is: give one of them.")
        if self.key_delimiter is not None and not self.key_delimiter.strip():
            raise InputError(f"`key_delimiter={self.key_delimiter!r}` is blank: give the text before the key.")
        if self.key_pattern is not None:
            self._check_pattern()

    def _check_pattern(self) -> None:
        try:
            groups = regex.compile(self.key_pattern).groupindex
        except regex.error as error:
            raise InputError(f"`key_pattern={self.key_pattern!r}` is no regular expression: {error}.") from error
        if "key" not in groups:
            raise InputError(
                f"`key_pattern={self.key_pattern!r}` has no group named `key`: write (?P<key>...) around the answer."
            )


def _number(value: Any) -> Any:
    """A text as a number, if it is one: YAML reads 5e-6 as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value
