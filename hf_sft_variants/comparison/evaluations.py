"""What is measured of a trained model, and of which rows it is the mean."""

import math
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..evaluation import generate_answers, held_out_nll_of_rows, numeric_answers
from ..evaluation.answers import extract_answer
from ..evaluation.matching import same_answer
from ..evaluation.tagged_answers import ANSWER_TAGS, THINKING_TAGS, extract_tagged_answer, follows_format
from ..launch.loading import load_split
from .lm_eval_tasks import evaluate_tasks


# Generated answers that are kept to be read
SAMPLES = 5


def load_evaluation_data(settings: dict[str, Any]) -> Dataset:
    """The rows that a study evaluates on."""
    return load_split(*(settings[name] for name in ("dataset_name", "dataset_split", "dataset_config")))


def evaluate_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    thinking_tags: Sequence[str] = THINKING_TAGS,
    answer_tags: Sequence[str] = ANSWER_TAGS,
) -> dict[str, Any]:
    """
    Evaluate a model as a study asks.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a chat template.
        settings (`dict[str, Any]`):
            `evaluations` of the study.
        thinking_tags (`Sequence[str]`, *optional*, defaults to `("<Thinking>", "</Thinking>")`):
            Opening and closing tag of the reasoning that the model was trained with, for `tagged`.
        answer_tags (`Sequence[str]`, *optional*, defaults to `("<Answer>", "</Answer>")`):
            Opening and closing tag of the answer, for `tagged`.

    Returns:
        `dict[str, Any]`: `evaluations`, by metric its mean, the values of the rows and how much each row counts; and
        `generations`, the first prompts and what the model writes.

    Raises:
        `InputError`: If the model's likelihoods are not finite.
    """
    dataset = load_evaluation_data(settings)
    tags = (thinking_tags, answer_tags)
    rows = held_out_nll_of_rows(model, tokenizer, dataset, settings["batch_size"], settings["tagged"], *tags)
    for i, (nll, _) in enumerate(rows):
        if not math.isfinite(nll):
            raise InputError(
                f"the model's NLL of test row {i} is {nll}: its training has diverged. Lower its learning rate, and "
                "remove the run's folder."
            )
    metrics = {"nll": metric([nll for nll, _ in rows], [count for _, count in rows], higher_is_better=False)}
    generations = []
    if settings["max_new_tokens"] is not None:
        has_answers = "answer" in dataset.column_names
        prompts = dataset["prompt"][:] if has_answers else dataset["prompt"][:SAMPLES]
        texts = generate_answers(model, tokenizer, prompts, settings["max_new_tokens"], settings["batch_size"])
        if has_answers:
            metrics |= answer_metrics(texts, dataset, settings["tagged"], *tags)
        generations = samples(dataset, texts)
    if settings["lm_eval"] is not None:
        metrics |= evaluate_tasks(model, tokenizer, settings["batch_size"], **settings["lm_eval"])
    return {"evaluations": metrics, "generations": generations}


def answer_metrics(
    texts: list[str],
    dataset: Dataset,
    tagged: bool,
    thinking_tags: Sequence[str] = THINKING_TAGS,
    answer_tags: Sequence[str] = ANSWER_TAGS,
) -> dict[str, Any]:
    """Right answers, and texts that have the form asked for."""
    if tagged:
        tags = (thinking_tags, answer_tags)
        pairs = zip(texts, dataset["answer"], strict=True)
        right = [same_answer(extract_tagged_answer(text, *tags), str(answer)) for text, answer in pairs]
        formatted = [follows_format(text, *tags) for text in texts]
    else:
        found = [extract_answer(text) for text in texts]
        right = [answer == expected for answer, expected in zip(found, numeric_answers(dataset), strict=True)]
        formatted = [answer is not None for answer in found]
    return {"accuracy": metric(list(map(int, right))), "format": metric(list(map(int, formatted)))}


def metric(
    rows: Sequence[float], counts: Sequence[int] | None = None, higher_is_better: bool = True
) -> dict[str, Any]:
    """A metric that is the ratio of two sums over the test rows; without `counts` every row counts once."""
    mean = sum(rows) / (len(rows) if counts is None else sum(counts))
    return {"mean": mean, "rows": rows, "counts": counts, "higher_is_better": higher_is_better}


def samples(dataset: Dataset, texts: list[str]) -> list[dict[str, str]]:
    """The first rows: what was asked, what the data says, and what the model wrote."""
    rows = dataset.select(range(min(SAMPLES, len(dataset))))
    return [
        {
            "prompt": _asked(row["prompt"]),
            "expected": _expected(row),
            "generation": text,
        }
        for row, text in zip(rows, texts, strict=False)
    ]


def _asked(prompt: list[dict[str, str]]) -> str:
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _expected(row: dict[str, Any]) -> str:
    return row["completion"][-1]["content"] if "completion" in row else str(row["answer"])
