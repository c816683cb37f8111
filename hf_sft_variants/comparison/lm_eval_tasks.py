"""Tasks of the optional package lm-eval, on a loaded model."""

from types import ModuleType
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError


def import_lm_eval() -> ModuleType:
    """
    Raises:
        `InputError`: If lm-eval is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise InputError(
            "`lm_eval` asks for tasks of lm-eval, which is not installed: run "
            "`pip install 'hf_sft_variants[lm-eval]'`."
        ) from error
    return lm_eval


def make_task_manager(include_path: str | None) -> Any:
    """Task manager of lm-eval that also knows the YAML files in `include_path`."""
    import_lm_eval()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def check_tasks(settings: dict[str, Any]) -> None:
    """
    Raises:
        `InputError`: If lm-eval is not installed, or does not know a task.
    """
    manager = make_task_manager(settings["include_path"])
    for task in settings["tasks"]:
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
    """The tasks' metrics by the names of task and metric; the last four arguments are a study's `lm_eval` settings."""
    lm_eval = import_lm_eval()
    from lm_eval.models.huggingface import HFLM

    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=tasks,
        limit=limit,
        num_fewshot=num_fewshot,
        task_manager=make_task_manager(include_path),
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
