"""Scores generated answers."""

from collections.abc import Callable, Sequence

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from .answers import extract_answer, extract_last_number, normalize_number
from .generation import generate_answers
from .held_out import check_dataset
from .matching import same_answer
from .tagged_answers import ANSWER_TAGS, THINKING_TAGS, extract_tagged_answer, follows_format


# Weights of the SFTKey paper's score
ACCURACY_WEIGHT, FORMAT_WEIGHT = 0.7, 0.3


def exact_match(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    max_new_tokens: int = 128,
    batch_size: int = 25,
) -> tuple[float, list[str]]:
    """
    Compute the share of prompts that the model answers correctly with greedy decoding.

    The answer is the number after the last `####`. It must equal the row's `answer`; only its notation (`36.0`,
    `1,036`) may differ. An answer that would come after `max_new_tokens` does not count.

    Args:
        dataset (`Dataset`):
            Rows with `prompt` (a conversation) and `answer` (a string).
        model, tokenizer, max_new_tokens, batch_size:
            As in [`generate_answers`].

    Returns:
        `tuple[float, list[str]]`: The share of correct answers, and the generated text for each row.

    Raises:
        `InputError`: If the data set is empty, lacks a column or is not conversational, or an answer is not a number.
    """
    check_dataset(dataset, ("prompt", "answer"))
    numeric_answers(dataset)  # fails early, before the slow generation
    generations = generate_answers(model, tokenizer, dataset["prompt"], max_new_tokens, batch_size)
    return _share_right(generations, dataset, extract_answer), generations


def last_number_match(generations: list[str], dataset: Dataset) -> float:
    """
    Compute the share of generated texts whose last number is the row's `answer`, whether or not it is marked with
    `####`. For a model that never learned the mark, this is fairer than [`exact_match`].

    Args:
        generations (`list[str]`):
            Generated text for each row, as returned by [`exact_match`].
        dataset (`Dataset`):
            Rows with `answer` (a string).

    Raises:
        `InputError`: If an answer is not a number.
    """
    return _share_right(generations, dataset, extract_last_number)


def tagged_scores(
    generations: Sequence[str],
    answers: Sequence[str],
    thinking_tags: Sequence[str] = THINKING_TAGS,
    answer_tags: Sequence[str] = ANSWER_TAGS,
) -> dict[str, float]:
    """
    Score generated texts as tagged responses, with accuracy and format measured independently.

    Answers are also read from malformed tags and from texts without tags
    ([`~hf_sft_variants.evaluation.tagged_answers.extract_tagged_answer`]).

    Args:
        generations (`Sequence[str]`):
            Generated text for each row, as returned by [`generate_answers`].
        answers (`Sequence[str]`):
            Expected answers, compared with [`~hf_sft_variants.evaluation.matching.same_answer`].
        thinking_tags, answer_tags (`Sequence[str]`, *optional*):
            Opening and closing tags of the reasoning and of the answer, by default `<Thinking>` and `<Answer>`.

    Returns:
        `dict[str, float]`: `accuracy` and `format_rate`, both shares of the rows, and `score`, the SFTKey paper's
        0.7 · accuracy + 0.3 · format rate.

    Raises:
        `InputError`: If there are no rows, the number of answers differs, an answer is `None`, or the tags are not
            pairs of strings.
    """
    if not generations or len(generations) != len(answers):
        raise InputError(
            f"`generations` has {len(generations)} rows and `answers` {len(answers)}: pass at least one generation, "
            "and one answer for each."
        )
    if None in answers:
        row = next(row for row, answer in enumerate(answers) if answer is None)
        raise InputError(f"`answers` of row {row} is None: fill it in or drop the row.")
    right, formatted = tagged_results(generations, answers, thinking_tags, answer_tags)
    accuracy, format_rate = (sum(results) / len(results) for results in (right, formatted))
    score = ACCURACY_WEIGHT * accuracy + FORMAT_WEIGHT * format_rate
    return {"accuracy": accuracy, "format_rate": format_rate, "score": score}


def tagged_results(
    generations: Sequence[str], answers: Sequence[str], thinking_tags: Sequence[str], answer_tags: Sequence[str]
) -> tuple[list[bool], list[bool]]:
    """Check whether each text has the expected answer, and whether it has the format of a tagged response."""
    found = [extract_tagged_answer(text, thinking_tags, answer_tags) for text in generations]
    right = [same_answer(answer, str(expected)) for answer, expected in zip(found, answers, strict=True)]
    return right, [follows_format(text, thinking_tags, answer_tags) for text in generations]


def numeric_answers(dataset: Dataset) -> list[str]:
    """
    Return the column `answer` with every number in its shortest form.

    Raises:
        `InputError`: If an answer is not a number.
    """
    answers = []
    for i, answer in enumerate(dataset["answer"]):
        try:
            answers.append(normalize_number(str(answer)))
        except InputError as error:
            raise InputError(f"`answer` of row {i} is {answer!r}, not a number: pass numbers only.") from error
    return answers


def _share_right(generations: list[str], dataset: Dataset, extract: Callable[[str], str | None]) -> float:
    answers = numeric_answers(dataset)
    return sum(extract(text) == answer for text, answer in zip(generations, answers, strict=True)) / len(answers)
