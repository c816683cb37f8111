"""Scores of generated answers."""

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
    Share of the prompts that the model answers right by itself, decoding greedily.

    An answer is the number behind the last `####` ([`~hf_sft_variants.evaluation.answers.extract_answer`]). It is
    right if it equals the row's `answer` exactly; only the way a number is written (`36.0`, `1,036`) makes no
    difference.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a chat template.
        dataset (`Dataset`):
            Rows with the conversation `prompt` and the string `answer`.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Where a generation is cut. An answer that comes later does not count.
        batch_size (`int`, *optional*, defaults to `25`):
            Prompts that are answered at once.

    Returns:
        `tuple[float, list[str]]`: The share, and what the model wrote for each row.

    Raises:
        InputError: If the data set is empty, lacks a column, has no conversations or has an answer that is no number.
    """
    check_dataset(dataset, ("prompt", "answer"))
    numeric_answers(dataset)  # what is wrong with them shows before the long step
    generations = generate_answers(model, tokenizer, dataset["prompt"], max_new_tokens, batch_size)
    return _share_right(generations, dataset, extract_answer), generations


def last_number_match(generations: list[str], dataset: Dataset) -> float:
    """
    Share of generated texts whose last number is the answer, marked with `####` or not.

    A model that was never taught the mark has no exact match at all. This is the fairer figure for it.

    Args:
        generations (`list[str]`):
            What a model wrote for each row, as [`exact_match`] returns it.
        dataset (`Dataset`):
            The rows, with the string `answer`.

    Returns:
        `float`: The share.

    Raises:
        InputError: If an answer is no number.
    """
    return _share_right(generations, dataset, extract_last_number)


def tagged_scores(
    generations: Sequence[str],
    answers: Sequence[str],
    thinking_tags: Sequence[str] = THINKING_TAGS,
    answer_tags: Sequence[str] = ANSWER_TAGS,
) -> dict[str, float]:
    """
    Scores generated texts as tagged responses.

    Accuracy does not depend on the format: an answer is read from malformed tags, and from texts without tags, too
    ([`~hf_sft_variants.evaluation.tagged_answers.extract_tagged_answer`]). The format rate says nothing about texts
    without tags.

    Args:
        generations (`Sequence[str]`):
            What a model wrote for each row, as [`generate_answers`] returns it.
        answers (`Sequence[str]`):
            The expected answers, compared by [`~hf_sft_variants.evaluation.matching.same_answer`].
        thinking_tags (`Sequence[str]`, *optional*, defaults to `("<Thinking>", "</Thinking>")`):
            Opening and closing tag of the reasoning.
        answer_tags (`Sequence[str]`, *optional*, defaults to `("<Answer>", "</Answer>")`):
            Opening and closing tag of the answer.

    Returns:
        `dict[str, float]`: `accuracy` and `format_rate`, both shares of the rows, and `score`, which is
        0.7 · accuracy + 0.3 · format rate as in the paper of SFTKey.

    Raises:
        InputError: If there are no rows, not as many answers as generations, an answer is `None`, or the tags are no
            pairs of strings.
    """
    if not generations or len(generations) != len(answers):
        raise InputError(
            f"`generations` has {len(generations)} rows and `answers` {len(answers)}: pass one answer for each of at "
            "least one generation."
        )
    if None in answers:
        raise InputError(f"`answers` of row {list(answers).index(None)} is None: fill it in or drop the row.")
    tags = (thinking_tags, answer_tags)
    right = [
        same_answer(extract_tagged_answer(text, *tags), str(answer))
        for text, answer in zip(generations, answers, strict=True)
    ]
    accuracy = sum(right) / len(right)
    format_rate = sum(follows_format(text, *tags) for text in generations) / len(right)
    score = ACCURACY_WEIGHT * accuracy + FORMAT_WEIGHT * format_rate
    return {"accuracy": accuracy, "format_rate": format_rate, "score": score}


def numeric_answers(dataset: Dataset) -> list[str]:
    """
    The column `answer`, every number written the same way.

    Raises:
        InputError: If an answer is no number.
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
