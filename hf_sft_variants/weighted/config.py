import math
from dataclasses import dataclass, field

from ..base.config import AnnotatedSFTConfig
from ..errors import InputError
from ..evaluation.tagged_answers import check_tags
from ..text.key_finder import KeyFinder, check_pattern


@dataclass
class WeightedSFTConfig(AnnotatedSFTConfig):
    r"""
    Configuration class for the [`WeightedSFTTrainer`].

    Lists only the parameters that [`AnnotatedSFTConfig`] does not have. Every weight is a number of 0 or more; a
    token's weights multiply, to 0 or a number from 1e-10 to 1e10, and a token with weight 0 has no label. By
    default, all weights are 1.

    Parameters that weight tokens:
        token_weight_column (`str`, *optional*):
            Column with a weight for each token of `input_ids`, in rows that come as tokens.
        message_weight_key (`str`, *optional*):
            Key of messages, such as `"weight"`, with the weight of the message: of everything that the chat template
            writes for it, from its header to the end of its turn. Messages without it count 1.
        example_weight_column (`str`, *optional*):
            Column with a weight for each row.
        prompt_weight (`float`, *optional*):
            Weight of the tokens that [`~trl.SFTTrainer`] leaves out of the loss because they belong to the prompt
            (`completion_only_loss`, `assistant_only_loss`, or labels of -100): they are labelled then. By default,
            they stay out of the loss.
        thinking_weight (`float`, *optional*, defaults to `1.0`):
            Weight of a response before its answer.
        answer_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the answer and of what follows it to the end of its turn.
        weight_normalization (`str`, *optional*, defaults to `"weights"`):
            What the sum of the weighted losses is divided by: the sum of the `"weights"` of the optimizer step, or its
            number of `"tokens"` with a label. With `"weights"`, the loss does not change if all weights are doubled.

    Parameters that locate the answer, for `thinking_weight` and `answer_weight`:
        thinking_tags (`list[str]`, *optional*, defaults to `["<Thinking>", "</Thinking>"]`):
            Opening and closing tags of the reasoning, which is followed by white space and the answer in its own tags.
        answer_tags (`list[str]`, *optional*, defaults to `["<Answer>", "</Answer>"]`):
            Opening and closing tags of the answer.
        key_delimiter (`str`, *optional*):
            Text that the answer begins with, such as `"####"`, instead of tags. It must occur exactly once in a
            response.
        key_pattern (`str`, *optional*):
            Regular expression with a group `key` where the answer begins, instead of tags, for example
            `r"</think>(?P<key>(?s:.*))"`. It must match a response exactly once. The syntax is that of the package
            `regex`.
        key_turns (`str`, *optional*, defaults to `"last"`):
            Whether to look for an answer in the `"last"` assistant turn or in `"all"`, of which at least one must have
            one. Other turns keep the weight 1.
    """

    token_weight_column: str | None = field(
        default=None,
        metadata={"help": "Column with a weight for each token of `input_ids`."},
    )
    message_weight_key: str | None = field(
        default=None,
        metadata={"help": "Key of messages with the weight of the message."},
    )
    example_weight_column: str | None = field(
        default=None,
        metadata={"help": "Column with a weight for each row."},
    )
    prompt_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the prompt's tokens; by default, they are not in the loss."},
    )
    thinking_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of a response before its answer."},
    )
    answer_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the answer."},
    )
    weight_normalization: str = field(
        default="weights",
        metadata={
            "help": "Divide by the sum of the weights, or by the number of tokens.",
            "choices": ["weights", "tokens"],
        },
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
        metadata={"help": "Text that the answer begins with, such as '####'."},
    )
    key_pattern: str | None = field(
        default=None,
        metadata={"help": "Regular expression with a group `key` where the answer begins."},
    )
    key_turns: str = field(
        default="last",
        metadata={"help": "Assistant turns to look for an answer in.", "choices": ["last", "all"]},
    )

    @property
    def find_key(self) -> KeyFinder:
        tags = tuple(self.thinking_tags), tuple(self.answer_tags)
        return KeyFinder(*tags, self.key_delimiter, self.key_pattern, key_turns=self.key_turns)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt_weight", "thinking_weight", "answer_weight"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"`{name}` must be a number of 0 or more, got {value!r}.")
        columns = [self.token_weight_column, self.example_weight_column]
        for name in ("token_weight_column", "message_weight_key", "example_weight_column"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise InputError(f"`{name}={value!r}` is blank: set it to a name.")
        if columns[0] is not None and columns[0] == columns[1]:
            raise InputError(
                f"`token_weight_column` and `example_weight_column` are both {columns[0]!r}: a weight for each token, "
                "or for the row? Set one of them."
            )
        if "token_weights" in columns:
            raise InputError(
                "`token_weights` is the column that the trainer makes of all weights: rename that of the data set, "
                "and set `token_weight_column` or `example_weight_column` to its new name."
            )
        check_tags(self.thinking_tags, self.answer_tags)
        if self.key_delimiter is not None and self.key_pattern is not None:
            raise InputError("`key_delimiter` and `key_pattern` both say where the answer is: set only one of them.")
        if self.key_delimiter is not None and not self.key_delimiter.strip():
            raise InputError(f"`key_delimiter={self.key_delimiter!r}` is blank: set it to the text before the answer.")
        if self.key_pattern is not None:
            check_pattern("key_pattern", self.key_pattern)
