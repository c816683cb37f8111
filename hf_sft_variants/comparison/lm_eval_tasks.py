"""Evaluates a loaded model on tasks of the optional package lm-eval."""

from types import ModuleType
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError


def import_lm_eval() -> ModuleType:
    """Import lm-eval; raises an `InputError` if it is not installed."""
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise InputError(
            "`lm_eval` asks for tasks of lm-eval, which is not installed: run "
            "`pip install 'hf_sft_variants[lm-eval]'`."
        ) from error
    return lm_eval


def check_tasks(tasks: list[str], include_path: str | None) -> None:
    """Raise an `InputError` if lm-eval is not installed or does not know a task."""
    manager = import_lm_eval().tasks.TaskManager(include_path=include_path)
    for task in tasks:
        if manager.match_tasks([task]) != [task]:
            raise InputError(
                f"`lm_eval`: `tasks` has {task!r}, which lm-eval does not know: `lm_eval ls tasks` lists its own; "
                "yours are YAML files in the folder `include_path`."
            )


def evaluate_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    tasks: list[str],
    limit: float | None,
    num_fewshot: int | None,
    include_path: str | None,
) -> dict[str, Any]:
    """Metrics by the names of task and metric. The last four arguments are the `lm_eval` settings of a study."""
    lm_eval = import_lm_eval()
    results = lm_eval.simple_evaluate(
        model=lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=tasks,
        limit=limit,
        num_fewshot=num_fewshot,
        task_manager=lm_eval.tasks.TaskManager(include_path=include_path),
        log_samples=False,
    )
    metrics = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            name, _, filter_name = key.partition(",")
            if not filter_name or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = f"{task}/{name}" if filter_name == "none" else f"{task}/{name} ({filter_name})"
            stderr = values.get(f"{name}_stderr,{filter_name}")
            metrics[label] = {
                "mean": value,
                "rows": None,
                "counts": None,
                "higher_is_better": results["higher_is_better"].get(task, {}).get(name),
                "stderr": stderr if isinstance(stderr, int | float) else None,
            }
    return metrics
