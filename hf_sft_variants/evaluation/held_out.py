"""Likelihood of held-out completions."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..scoring import LogProbScorer
from .generation import batches, evaluation_mode, prompt_token_ids
from .tagged_answers import ANSWER_TAGS, THINKING_TAGS, tagged_response


TAGGED_COLUMNS = ("reasoning", "answer")


class ScoredRow(NamedTuple):
    """
    A row's conversations and tokens. `log_probs` has the log-probability of each token of the completion and 0 for
    others, `top_log_probs` that of the most likely token in its place; `nll` is the negative sum over the `num_tokens`
    of the completion.
    """

    prompt: list[dict]
    completion: list[dict]
    input_ids: list[int]
    log_probs: np.ndarray
    top_log_probs: np.ndarray | None
    nll: float
    num_tokens: int


def held_out_nll(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    batch_size: int = 25,
    tagged: bool = False,
    thinking_tags: Sequence[str] = THINKING_TAGS,
    answer_tags: Sequence[str] = ANSWER_TAGS,
) -> float:
    """
    Compute the negative log-likelihood of the completions in nats per token, averaged over all their tokens.

    The tokens are those that [`~trl.SFTTrainer`] supervises: everything after the prompt and the generation prompt,
    including the end of the turn.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a chat template.
        dataset (`Dataset`):
            Rows with the conversations `prompt` and `completion`.
        batch_size (`int`, *optional*, defaults to `25`):
            Number of rows per forward pass. It only affects speed and memory.
        tagged (`bool`, *optional*, defaults to `False`):
            Whether the completions are tagged responses, built from the columns `reasoning` and `answer`. Without
            `reasoning`, `completion` must contain them.
        thinking_tags, answer_tags (`Sequence[str]`, *optional*):
            Opening and closing tags of the reasoning and of the answer, by default `<Thinking>` and `<Answer>`.

    Raises:
        `InputError`: If the data set is empty, lacks a column, is not conversational, or has only empty completions.
    """
    rows = held_out_nll_of_rows(model, tokenizer, dataset, batch_size, tagged, thinking_tags, answer_tags)
    return sum(nll for nll, _ in rows) / sum(count for _, count in rows)


def held_out_nll_of_rows(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    batch_size: int = 25,
    tagged: bool = False,
    thinking_tags: Sequence[str] = THINKING_TAGS,
    answer_tags: Sequence[str] = ANSWER_TAGS,
) -> list[tuple[float, int]]:
    """
    Compute the negative log-likelihood of each row's completion in nats, and its number of tokens.

    Takes the arguments and raises the errors of [`held_out_nll`], which is the ratio of the two sums.
    """
    rows = score_rows(model, tokenizer, dataset, batch_size, tagged, thinking_tags, answer_tags)
    return [(row.nll, row.num_tokens) for row in rows]


def score_rows(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    batch_size: int = 25,
    tagged: bool = False,
    thinking_tags: Sequence[str] = THINKING_TAGS,
    answer_tags: Sequence[str] = ANSWER_TAGS,
    top: bool = False,
) -> list[ScoredRow]:
    """
    Compute the log-probability of each token of each row's completion and, with `top`, of the most likely tokens.

    Takes the arguments and raises the errors of [`held_out_nll`].
    """
    if tagged:
        check_tagged_dataset(dataset)
    else:
        check_dataset(dataset, ("prompt", "completion"))
    tags = (thinking_tags, answer_tags) if tagged else None
    conversations = [(row["prompt"], _completion(row, i, tags)) for i, row in enumerate(dataset)]
    examples = [_tokenize(tokenizer, *conversation) for conversation in conversations]
    if not any(label != -100 for example in examples for label in example["labels"][1:]):
        raise InputError("`dataset` has only empty completions: pass at least one that has tokens.")
    scores: list[dict[str, Any]] = [{}] * len(examples)
    with evaluation_mode(model):
        scorer = LogProbScorer(model, per_token=True, top=top)
        for batch in batches([len(example["input_ids"]) for example in examples], batch_size, "Held-out NLL"):
            for i, score in zip(batch, scorer([examples[i] for i in batch]), strict=True):
                scores[i] = score
    return [
        ScoredRow(
            *conversation,
            example["input_ids"],
            score["token_log_probs"],
            score.get("top_log_probs"),
            -score["sum_log_prob"],
            score["num_tokens"],
        )
        for conversation, example, score in zip(conversations, examples, scores, strict=True)
    ]


def check_dataset(dataset: Dataset, columns: Sequence[str]) -> None:
    """
    Check that a data set has rows and the given columns, and that `prompt` and `completion` are conversations.

    Raises:
        `InputError`: If it does not.
    """
    _check_columns(dataset, columns, "rename or add what is missing")
    if len(dataset) == 0:
        raise InputError("`dataset` is empty: pass at least one row.")
    for column in (column for column in columns if column != "answer"):
        for i, value in enumerate(dataset[column]):
            is_conversation = isinstance(value, list) and all(isinstance(message, dict) for message in value)
            if not is_conversation or (column == "prompt" and not value):
                raise InputError(
                    f"Column {column!r} of `dataset` holds {value!r} in row {i}: pass conversations, i.e. lists of "
                    "{'role': ..., 'content': ...}."
                )


def check_tagged_dataset(dataset: Dataset) -> None:
    """
    Check that a data set has the columns `prompt` (a conversation), `answer` (a string), and either `reasoning` or
    `completion` (a conversation).

    Raises:
        `InputError`: If it does not.
    """
    if "completion" in dataset.column_names and "reasoning" not in dataset.column_names:
        check_dataset(dataset, ("prompt", "completion", "answer"))
    else:
        _check_columns(dataset, TAGGED_COLUMNS, "tagged responses are built from 'reasoning' and 'answer'")
        check_dataset(dataset, ("prompt", "answer"))


def _check_columns(dataset: Dataset, columns: Sequence[str], fix: str) -> None:
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise InputError(
            f"`dataset` has no column {', '.join(map(repr, missing))}, only "
            f"{', '.join(map(repr, dataset.column_names))}: {fix}."
        )


def _completion(row: dict, i: int, tags: tuple[Sequence[str], Sequence[str]] | None) -> list[dict]:
    if tags is None or "reasoning" not in row:
        return row["completion"]
    for column in TAGGED_COLUMNS:
        if row[column] is None:
            raise InputError(f"`{column}` of row {i} is None: fill it in or drop the row.")
    content = tagged_response(str(row["reasoning"]), str(row["answer"]), *tags)
    return [{"role": "assistant", "content": content}]


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompt: list[dict], completion: list[dict]) -> dict[str, list[int]]:
    """Tokenize a row as SFTTrainer does, with labels on the completion only."""
    prompt_ids = prompt_token_ids(tokenizer, prompt)
    ids = tokenizer.apply_chat_template(prompt + completion, tokenize=True, return_dict=True)["input_ids"]
    # Some templates render a prompt differently on its own: the completion starts where the two diverge
    same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, ids, strict=False))
    prompt_length = len(list(same))
    return {"input_ids": ids, "labels": [-100] * prompt_length + ids[prompt_length:]}
