"""Metrics of a trained model, with the value of every test row."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..evaluation import generate_answers, numeric_answers
from ..evaluation.answers import extract_answer
from ..evaluation.calibration import expected_calibration_error
from ..evaluation.held_out import score_rows
from ..evaluation.parts import nll_of_part
from ..evaluation.scores import tagged_results
from ..evaluation.tagged_answers import ANSWER_TAGS, THINKING_TAGS
from ..launch.loading import load_split
from .lm_eval_tasks import evaluate_tasks


# Number of generated answers kept for the report
SAMPLES = 5


def load_evaluation_data(settings: dict[str, Any]) -> Dataset:
    return load_split(settings["dataset_name"], settings["dataset_split"], settings["dataset_config"])


def evaluate_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    thinking_tags: Sequence[str] = THINKING_TAGS,
    answer_tags: Sequence[str] = ANSWER_TAGS,
) -> dict[str, Any]:
    """
    Evaluate a model with the `evaluations` settings of a study. Returns `evaluations`, the metrics by name
    ([`metric`]), and `generations`, the first prompts with the generated answers. Raises an `InputError` if the
    model's likelihoods are not finite.
    """
    dataset = load_evaluation_data(settings)
    tags = (thinking_tags, answer_tags)
    rows = score_rows(
        model, tokenizer, dataset, settings["batch_size"], settings["tagged"], *tags, top=settings["calibration"]
    )
    for i, row in enumerate(rows):
        if not math.isfinite(row.nll):
            raise InputError(
                f"the model's NLL of test row {i} is {row.nll}: its training has diverged. Lower its learning rate, "
                "and remove the run's folder."
            )
    metrics = {"nll": nll_metric((row.nll, row.num_tokens) for row in rows)}
    for name, pattern in (settings["parts"] or {}).items():
        metrics[f"NLL of {name}"] = nll_metric(nll_of_part(rows, tokenizer, pattern))
    if settings["calibration"]:
        error = expected_calibration_error(rows)
        metrics["ECE"] = {"mean": error, "rows": None, "counts": None, "higher_is_better": False}
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
    """Accuracy of the answers, and the share of texts in the expected format."""
    if tagged:
        right, formatted = tagged_results(texts, dataset["answer"], thinking_tags, answer_tags)
    else:
        found = [extract_answer(text) for text in texts]
        right = [answer == expected for answer, expected in zip(found, numeric_answers(dataset), strict=True)]
        formatted = [answer is not None for answer in found]
    return {"accuracy": metric(list(map(int, right))), "format": metric(list(map(int, formatted)))}


def metric(
    rows: Sequence[float], counts: Sequence[int] | None = None, higher_is_better: bool = True
) -> dict[str, Any]:
    """A metric that is `sum(rows) / sum(counts)` over the test rows; without `counts`, every row counts once."""
    mean = sum(rows) / (len(rows) if counts is None else sum(counts))
    return {"mean": mean, "rows": rows, "counts": counts, "higher_is_better": higher_is_better}


def nll_metric(rows: Iterable[tuple[float, int]]) -> dict[str, Any]:
    """The negative log-likelihood per token, from that of each row and its number of tokens."""
    nll, counts = map(list, zip(*rows, strict=True))
    return metric(nll, counts, higher_is_better=False)


def samples(dataset: Dataset, texts: list[str]) -> list[dict[str, str]]:
    """The first rows with their prompt, expected answer and generated answer."""
    rows = dataset.select(range(min(SAMPLES, len(dataset))))
    return [
        {"prompt": _prompt_text(row["prompt"]), "expected": _expected(row), "generation": text}
        for row, text in zip(rows, texts, strict=False)
    ]


def _prompt_text(prompt: list[dict[str, str]]) -> str:
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _expected(row: dict[str, Any]) -> str:
    return row["completion"][-1]["content"] if "completion" in row else str(row["answer"])
