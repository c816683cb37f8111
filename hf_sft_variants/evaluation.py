"""How good a model is on held-out prompts and completions: their likelihood, and the answers it gives itself."""

from collections.abc import Callable, Sequence
from itertools import takewhile

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .answer_matching import same_answer
from .answers import extract_answer, extract_last_number, normalize_number
from .errors import InputError
from .generation import batches, evaluation_mode, generate_answers, prompt_token_ids
from .loading import check_dataset
from .scoring import LogProbScorer
from .tagged_answers import ANSWER_TAGS, THINKING_TAGS, extract_tagged_answer, follows_format, tagged_response


__all__ = [
    "check_tagged_dataset",
    "exact_match",
    "generate_answers",
    "held_out_nll",
    "held_out_nll_of_rows",
    "last_number_match",
    "tagged_scores",
]

TAGGED_COLUMNS = ("reasoning", "answer")
# The paper's score
ACCURACY_WEIGHT, FORMAT_WEIGHT = 0.7, 0.3


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
    Negative log-likelihood of the completions, in nats per token, as a mean over all their tokens.

    The tokens are those that [`~trl.SFTTrainer`] supervises: everything behind the prompt and the generation prompt,
    with the end of the turn.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a chat template.
        dataset (`Dataset`):
            Rows with the conversations `prompt` and `completion`.
        batch_size (`int`, *optional*, defaults to `25`):
            Rows per forward pass. It changes speed and memory only.
        tagged (`bool`, *optional*, defaults to `False`):
            Whether the completions are tagged responses, made of the columns `reasoning` and `answer`. A data set
            without `reasoning` must have them ready as `completion`.
        thinking_tags (`Sequence[str]`, *optional*, defaults to `("<Thinking>", "</Thinking>")`):
            Opening and closing tag of the reasoning, for `tagged`.
        answer_tags (`Sequence[str]`, *optional*, defaults to `("<Answer>", "</Answer>")`):
            Opening and closing tag of the answer, for `tagged`.

    Returns:
        `float`: The mean negative log-likelihood.

    Raises:
        InputError: If the data set is empty, lacks a column, has no conversations or only empty completions.
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
    Of each row the negative log-likelihood of its completion, in nats, and the number of its tokens.

    Arguments and errors are those of [`held_out_nll`], which is the ratio of the two sums.
    """
    if tagged:
        check_tagged_dataset(dataset)
    else:
        check_dataset(dataset, ("prompt", "completion"))
    tags = (thinking_tags, answer_tags) if tagged else None
    rows = [_tokenize(tokenizer, row["prompt"], _completion(row, i, tags)) for i, row in enumerate(dataset)]
    if not any(label != -100 for row in rows for label in row["labels"][1:]):
        raise InputError("`dataset` has only empty completions: pass at least one that has tokens.")
    results = [(0.0, 0)] * len(rows)
    with evaluation_mode(model):
        scorer = LogProbScorer(model)
        for batch in batches([len(row["input_ids"]) for row in rows], batch_size, "Held-out NLL"):
            for i, result in zip(batch, scorer([rows[i] for i in batch]), strict=True):
                results[i] = (-result["sum_log_prob"], result["num_tokens"])
    return results


def exact_match(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    max_new_tokens: int = 128,
    batch_size: int = 25,
) -> tuple[float, list[str]]:
    """
    Share of the prompts that the model answers right by itself, decoding greedily.

    An answer is the number behind the last `####` ([`~hf_sft_variants.answers.extract_answer`]). It is right if it
    equals the row's `answer` exactly; only the way a number is written (`36.0`, `1,036`) makes no difference.

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
    ([`~hf_sft_variants.tagged_answers.extract_tagged_answer`]). Of texts without tags the format rate says nothing.

    Args:
        generations (`Sequence[str]`):
            What a model wrote for each row, as [`generate_answers`] returns it.
        answers (`Sequence[str]`):
            The expected answers, compared by [`~hf_sft_variants.answer_matching.same_answer`].
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


def check_tagged_dataset(dataset: Dataset) -> None:
    """
    Checks that tagged responses can be evaluated on a data set.

    Args:
        dataset (`Dataset`):
            Rows with the conversation `prompt`, the string `answer`, and `reasoning` or the conversation `completion`.

    Raises:
        InputError: If the data set is empty, lacks a column or has no conversations.
    """
    if "reasoning" in dataset.column_names or "completion" not in dataset.column_names:
        missing = [column for column in TAGGED_COLUMNS if column not in dataset.column_names]
        if missing:
            raise InputError(
                f"`dataset` has no column {', '.join(map(repr, missing))}, only "
                f"{', '.join(map(repr, dataset.column_names))}: tagged responses are made of 'reasoning' and 'answer'."
            )
        check_dataset(dataset, ("prompt", "answer"))
    else:
        check_dataset(dataset, ("prompt", "completion", "answer"))


def _share_right(generations: list[str], dataset: Dataset, extract: Callable[[str], str | None]) -> float:
    answers = numeric_answers(dataset)
    return sum(extract(text) == answer for text, answer in zip(generations, answers, strict=True)) / len(answers)


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


def _completion(row: dict, i: int, tags: tuple[Sequence[str], Sequence[str]] | None) -> list[dict]:
    if tags is None or "reasoning" not in row:
        return row["completion"]
    for column in TAGGED_COLUMNS:
        if row[column] is None:
            raise InputError(f"`{column}` of row {i} is None: fill it in or drop the row.")
    content = tagged_response(str(row["reasoning"]), str(row["answer"]), *tags)
    return [{"role": "assistant", "content": content}]


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompt: list[dict], completion: list[dict]) -> dict[str, list[int]]:
    """`input_ids` of a row, and `labels` on its completion; both as SFTTrainer finds them."""
    prompt_ids = prompt_token_ids(tokenizer, prompt)
    ids = tokenizer.apply_chat_template(prompt + completion, tokenize=True, return_dict=True)["input_ids"]
    # Some templates render the prompt alone differently: the completion starts where the two part
    same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, ids, strict=False))
    prompt_length = len(list(same))
    return {"input_ids": ids, "labels": [-100] * prompt_length + ids[prompt_length:]}
