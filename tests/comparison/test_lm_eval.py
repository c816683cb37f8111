"""Tasks of lm-eval, offline on local data."""

import json
import sys
from functools import partial

import pytest
import yaml
from helpers import padded_document_log_probs

from hf_sft_variants.comparison import plan_runs, read_study
from hf_sft_variants.comparison.evaluations import evaluate_model
from hf_sft_variants.comparison.lm_eval_tasks import import_lm_eval
from hf_sft_variants.comparison.study import EVALUATION_DEFAULTS
from hf_sft_variants.errors import InputError
from hf_sft_variants.launch.loading import load_model_and_tokenizer


TASK = {
    "task": "tiny_choice",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["yes", "no"],
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def tasks(folder, monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks", reason="tasks of lm-eval need lm-eval")
    # Reading lm-eval's own tasks takes 20 seconds
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    rows = [{"question": f"Is {i} even? ", "label": i % 2} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    (folder / "tasks" / "tiny_choice.yaml").write_text(yaml.safe_dump(task))
    return rows


def test_a_local_task(tasks):
    model, tokenizer = load_model_and_tokenizer("model", device="cpu")
    lm_eval = {"tasks": ["tiny_choice"], "limit": None, "num_fewshot": 0, "include_path": "tasks"}
    settings = {**EVALUATION_DEFAULTS, "dataset_name": "data", "max_new_tokens": None, "lm_eval": lm_eval}
    metrics = evaluate_model(model, tokenizer, settings)["evaluations"]
    assert list(metrics) == ["nll", "tiny_choice/acc"]
    right = []
    for row in tasks:
        choices = [log_prob_of(model, tokenizer, row["question"], choice) for choice in TASK["doc_to_choice"]]
        right.append(choices.index(max(choices)) == row["label"])
    metric = metrics["tiny_choice/acc"]
    assert metric["mean"] == pytest.approx(sum(right) / 6)
    assert (metric["rows"], metric["higher_is_better"]) == (None, True) and metric["stderr"] >= 0
    assert json.dumps(metrics, allow_nan=False)


def log_prob_of(model, tokenizer, question, choice):
    context = tokenizer(question.rstrip())["input_ids"]
    ids = tokenizer(f"{question} {choice}")["input_ids"]
    labels = [-100] * len(context) + ids[len(context) :]
    return sum(value for value in padded_document_log_probs(model, ids, labels) if value is not None)


def test_an_unknown_task_is_refused(tasks, write_study):
    study = read_study(write_study(evaluations={"lm_eval": {"tasks": ["tiny_choise"], "include_path": "tasks"}}))
    with pytest.raises(InputError, match="`tasks` has 'tiny_choise', which lm-eval does not know"):
        plan_runs(study)
    known = read_study(write_study(evaluations={"lm_eval": {"tasks": ["tiny_choice"], "include_path": "tasks"}}))
    assert plan_runs(known)


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"which is not installed: run `pip install 'hf_sft_variants\[lm-eval\]'`"):
        import_lm_eval()
