"""Multiplies the weights of a row into one for each token."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from ..errors import InputError
from ..text.assistant_turns import RenderedExample, Turn, messages_of
from ..text.key_finder import KeyFinder, NoKeyError
from ..text.turn_reader import TurnReader


# Beyond these, the squares of gradients (Adam's, the norm's) leave float32
SMALLEST, LARGEST = 1e-10, 1e10


@dataclass(frozen=True)
class TokenWeigher:
    """
    Makes the weights and the labels of an example's tokens, with the settings of [`WeightedSFTConfig`]. Raises an
    `InputError` if a weight is negative or not a number, or what it belongs to is not found.
    """

    token_weight_column: str | None
    message_weight_key: str | None
    example_weight_column: str | None
    prompt_weight: float | None
    thinking_weight: float
    answer_weight: float
    find_key: KeyFinder

    def __call__(self, example: dict[str, Any], read_turns: TurnReader) -> tuple[list[float], list[int]]:
        input_ids, labels = np.asarray(example["input_ids"]), np.asarray(example["labels"])
        weights = np.ones(len(input_ids))
        if self.example_weight_column is not None:
            weights *= _numbers([example.get(self.example_weight_column)], f"`{self.example_weight_column}`")
        if self.token_weight_column is not None:
            weights *= self._of_tokens(example.get(self.token_weight_column), len(input_ids))
        if self.message_weight_key is not None:
            self._weigh_messages(weights, example, read_turns)
        if (self.thinking_weight, self.answer_weight) != (1, 1):
            self._weigh_answers(weights, read_turns(example))
        if self.prompt_weight is not None:
            is_prompt = labels == -100
            if not is_prompt.any() and "prompt" not in example:
                raise InputError(
                    f"every token has a label, so there is no prompt for `prompt_weight={self.prompt_weight}`. Give "
                    "`prompt` and `completion`, set `assistant_only_loss=True`, or label prompts with -100"
                )
            weights[is_prompt] *= self.prompt_weight
            labels = np.where(is_prompt, input_ids, labels)
        outside = (weights != 0) & ~((weights >= SMALLEST) & (weights <= LARGEST))
        if outside.any():
            raise InputError(
                f"the weights of a token multiply to {weights[outside][0]}; the product must be 0, or from "
                f"{SMALLEST:g} to {LARGEST:g}"
            )
        labels = np.where(weights > 0, labels, -100)
        return np.where(labels != -100, weights, 0.0).tolist(), labels.tolist()

    def _of_tokens(self, values: Any, num_tokens: int) -> np.ndarray:
        where = f"`{self.token_weight_column}`"
        if not isinstance(values, list) or len(values) != num_tokens:
            found = f"{len(values)} values" if isinstance(values, list) else repr(values)
            raise InputError(f"{where} has {found}, but `input_ids` has {num_tokens} tokens; give one for each")
        return _numbers(values, where)

    def _weigh_messages(self, weights: np.ndarray, example: dict[str, Any], read_turns: TurnReader) -> None:
        key = self.message_weight_key
        if not is_conversational(example):
            raise InputError(f"`message_weight_key={key!r}` needs messages, but the row has none")
        weighed = {i: message[key] for i, message in enumerate(messages_of(example)) if message.get(key) is not None}
        for i, weight in weighed.items():
            _numbers([weight], f"`{key}` of message {i}")
        tokens = read_turns.message_tokens(example) if weighed else []
        for i, weight in weighed.items():
            if tokens[i] is not None:
                weights[tokens[i]] *= weight
            elif weight != 1 and self._may_be_in_loss(tokens, example["labels"]):
                raise InputError(
                    f"message {i}, whose `{key}` is {weight!r}, can't be told from its neighbours: the chat template "
                    "moves its words, or writes it differently once others follow. Set `assistant_only_loss=True` "
                    "without `prompt_weight`, or give `input_ids` and `token_weight_column`"
                )

    def _may_be_in_loss(self, tokens: list[list[int] | None], labels: list[int]) -> bool:
        """Whether any token outside the messages that were found has a label, or gets one from `prompt_weight`."""
        known = {token for of_message in tokens for token in of_message or []}
        return any(
            i not in known and (label != -100 or self.prompt_weight is not None) for i, label in enumerate(labels)
        )

    def _weigh_answers(self, weights: np.ndarray, documents: list[RenderedExample]) -> None:
        start = 0
        for document in documents:
            of_document = weights[start : start + len(document.token_ids)]
            for turn, in_answer in self.find_key.tokens_by_turn(document).items():
                factors = dict.fromkeys(_tokens_of(document, turn), self.thinking_weight)
                factors |= dict.fromkeys(in_answer, self.answer_weight)
                of_document[list(factors)] *= list(factors.values())
            start += len(document.token_ids)


def add_token_weights(
    examples: dict[str, list],
    rows: list[int],
    weigh: TokenWeigher,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    text_field: str,
    has_text: bool,
    dataset_name: str,
) -> dict[str, list]:
    """
    Add the column `token_weights`, and update `labels`: prompts with a weight get labels, tokens of weight 0 lose
    theirs. For `Dataset.map`, batched. Raises an `InputError` that names the row whose weights can't be used.
    """
    read_turns = TurnReader(tokenizer, chat_template, text_field, has_text, weigh.find_key)
    all_weights, all_labels = [], []
    for i, row in enumerate(rows):
        example = {column: values[i] for column, values in examples.items() if values[i] is not None}
        try:
            weights, labels = weigh(example, read_turns)
        except InputError as problem:
            fix = " Set `key_delimiter`, `key_pattern` or the tags." if isinstance(problem, NoKeyError) else ""
            raise InputError(f"Row {row} of the {dataset_name} dataset: {problem}.{fix}") from problem
        all_weights.append(weights)
        all_labels.append(labels)
    return {"token_weights": all_weights, "labels": all_labels}


def _numbers(values: list[Any], where: str) -> np.ndarray:
    for value in values:
        if not (isinstance(value, Real) and math.isfinite(value) and value >= 0):
            raise InputError(f"{where} has {value!r}: give a number of 0 or more")
    return np.asarray(values, dtype=np.float64)


def _tokens_of(document: RenderedExample, turn: Turn) -> list[int]:
    """Tokens of a turn's words, and those that follow up to its end."""
    tokens = document.tokens_in(turn.content)
    return [*tokens, *range(max(tokens) + 1, turn.end_token)]
