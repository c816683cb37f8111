"""Evaluations of a model, row by row."""

import pytest
import torch
from datasets import Dataset

from hf_sft_variants.comparison.evaluations import answer_metrics, evaluate_model
from hf_sft_variants.comparison.study import EVALUATION_DEFAULTS
from hf_sft_variants.errors import InputError
from hf_sft_variants.evaluation import held_out_nll, last_number_match, tagged_scores
from hf_sft_variants.launch.loading import load_model_and_tokenizer, load_split


def mean_of(metric):
    return sum(metric["rows"]) / sum(metric["counts"] or [1] * len(metric["rows"]))


def test_tagged_answers_are_scored_as_evaluate_does():
    texts = [
        "<Thinking>a</Thinking>\n<Answer>5</Answer>",
        "<Answer>6",
        "7",
        "<Thinking>a</Thinking><Answer>x</Answer>",
    ]
    rows = Dataset.from_dict({"answer": ["5", "6", "8", "9"]})
    metrics, scores = answer_metrics(texts, rows, tagged=True), tagged_scores(texts, rows["answer"])
    assert metrics["accuracy"]["rows"] == [1, 1, 0, 0] and metrics["format"]["rows"] == [1, 0, 0, 1]
    assert metrics["accuracy"]["mean"] == scores["accuracy"] and metrics["format"]["mean"] == scores["format_rate"]


def test_numbers_behind_the_mark():
    texts = ["a\n#### 5.0", "6", "#### seven", "#### 1,000"]
    metrics = answer_metrics(texts, Dataset.from_dict({"answer": ["5", "6", "7", "1000"]}), tagged=False)
    assert metrics["accuracy"]["rows"] == [1, 0, 0, 1] and metrics["format"]["rows"] == [1, 0, 0, 1]
    assert last_number_match(texts, Dataset.from_dict({"answer": ["5", "6", "7", "1000"]})) == 0.75


@pytest.mark.parametrize("batch_size", [1, 3])
def test_nll_of_each_row(folder, batch_size):
    model, tokenizer = load_model_and_tokenizer("model", device="cpu")
    rows = load_split("data", "train")
    settings = {**EVALUATION_DEFAULTS, "dataset_name": "data", "dataset_split": "train", "batch_size": batch_size}
    result = evaluate_model(model, tokenizer, {**settings, "max_new_tokens": None})
    assert list(result["evaluations"]) == ["nll"] and result["generations"] == []
    nll = result["evaluations"]["nll"]
    assert nll["mean"] == mean_of(nll) == held_out_nll(model, tokenizer, rows, batch_size)
    assert nll["higher_is_better"] is False
    for i in range(len(rows)):
        alone = held_out_nll(model, tokenizer, rows.select([i]))
        assert nll["rows"][i] / nll["counts"][i] == pytest.approx(alone, rel=1e-5)


def test_nll_of_parts(folder):
    """Each token by hand: a part has the tokens that a match touches, and no other."""
    model, tokenizer = load_model_and_tokenizer("model", device="cpu")
    rows = load_split("data", "train")
    parts = {"steps": "(?s)(.*)####", "answer": "#### (.*)", "mark": "####(?= )", "sevens": "7"}
    settings = {**EVALUATION_DEFAULTS, "dataset_name": "data", "dataset_split": "train", "max_new_tokens": None}
    metrics = evaluate_model(model, tokenizer, {**settings, "parts": parts})["evaluations"]
    assert list(metrics) == ["nll", "NLL of steps", "NLL of answer", "NLL of mark", "NLL of sevens"]
    assert all(part["higher_is_better"] is False for part in metrics.values())
    for i, row in enumerate(rows):
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        encoding = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
        with torch.no_grad():
            log_probs = model(encoding["input_ids"]).logits[0].double().log_softmax(-1)
        start = text.index(row["completion"][0]["content"])
        mark = text.index("####")
        spans = {
            "steps": [(start, mark)],
            "answer": [(mark + 5, text.index("<|im_end|>", mark))],
            "mark": [(mark, mark + 4)],
            "sevens": [(k, k + 1) for k in range(start, len(text)) if text[k] == "7"],
        }
        for name, of_part in spans.items():
            tokens = [
                k
                for k, (first, last) in enumerate(encoding["offset_mapping"][0].tolist())
                if any(first < end and last > begin for begin, end in of_part)
            ]
            expected = -sum(log_probs[k - 1, encoding["input_ids"][0, k]].item() for k in tokens)
            metric = metrics[f"NLL of {name}"]
            assert metric["counts"][i] == len(tokens)
            assert metric["rows"][i] == pytest.approx(expected, rel=1e-5)
    assert 0 in metrics["NLL of sevens"]["counts"] and sum(metrics["NLL of sevens"]["counts"]) > 0


def test_calibration(folder):
    """A random model is sure of nothing and right about as often; one that is sure of one token is wrong."""
    model, tokenizer = load_model_and_tokenizer("model", device="cpu")
    settings = {**EVALUATION_DEFAULTS, "dataset_name": "data", "max_new_tokens": None, "calibration": True}
    before = evaluate_model(model, tokenizer, settings)["evaluations"]
    assert before["ECE"]["rows"] is None and before["ECE"]["higher_is_better"] is False
    nll = evaluate_model(model, tokenizer, {**settings, "calibration": False})["evaluations"]["nll"]
    assert before["nll"]["rows"] == pytest.approx(nll["rows"], rel=1e-5)
    model.lm_head.weight.data *= 100
    after = evaluate_model(model, tokenizer, settings)["evaluations"]
    assert before["ECE"]["mean"] < 0.5 < 0.9 < after["ECE"]["mean"] <= 1


def test_a_model_that_has_diverged_says_so(folder):
    model, tokenizer = load_model_and_tokenizer("model", device="cpu")
    model.lm_head.weight.data.fill_(float("nan"))
    settings = {**EVALUATION_DEFAULTS, "dataset_name": "data", "max_new_tokens": None}
    with pytest.raises(
        InputError, match="NLL of test row 0 is nan: its training has diverged. Lower its learning rate"
    ):
        evaluate_model(model, tokenizer, settings)


def test_dialogues_have_no_answers_to_compare_with(folder):
    """Only what is shown is generated."""
    load_split("data", "train").remove_columns("answer").to_json("dialogues/test.jsonl")
    model, tokenizer = load_model_and_tokenizer("model", device="cpu")
    settings = {**EVALUATION_DEFAULTS, "dataset_name": "dialogues", "max_new_tokens": 2}
    result = evaluate_model(model, tokenizer, settings)
    assert list(result["evaluations"]) == ["nll"] and len(result["generations"]) == 5
    first = load_split("dialogues")[0]
    assert result["generations"][0]["prompt"] == first["prompt"][0]["content"]
    assert result["generations"][0]["expected"] == first["completion"][0]["content"]
