"""The runs that `test_processes.py` makes on one process, and `steps_of_processes.py` on two."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from helpers import make_trainer
from methods import METHODS, SFT, with_references
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sft_variants.sftkey.answer_accuracy import AnswerAccuracyCallback


# Sixteen rows are two optimizer steps of an epoch; on one process with twice the accumulation
STEPS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "optim": "adamw_torch",
    "adam_epsilon": 1e-4,  # the default makes steps of full size of gradients that are rounding errors
    "max_grad_norm": 1.0,
    "save_strategy": "no",
}
SAVING = {"save_strategy": "steps", "save_steps": 2}
# On eleven rows the last batch is smaller, and accelerate repeats rows to give each process as many
UNEVEN = {"max_steps": 3}
SEPARATE_COUNTS = {"max_steps": 2, "average_tokens_across_devices": False}

AS_USED = {name: method.options for name, method in METHODS.items()}
AS_USED["sftkey"] = {**AS_USED["sftkey"], "stages": ["full", "key"]}  # with a fresh optimizer in between
RECIPE_METHODS = {"ddp": "sft_go", "fsdp2": "sftmix", "zero2": "sftkey", "zero3": "poft"}


@dataclass
class Case:
    """A run of a method, or of "sft", on the rows of a file and with a saved model."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    rows: str = "texts"
    model: str = "untied"
    is_loaded: bool = False  # the trainer gets the model itself, not its folder
    lora: bool = False
    eval_rows: str | None = None
    resumes: str | None = None  # from another case's checkpoint after two steps


def cases_like_one_process(folder: Path) -> dict[str, Case]:
    """These are equal on any number of processes."""
    cases = {name: Case(name, {**options, **SAVING}, eval_rows="texts") for name, options in AS_USED.items()}
    cases |= {f"{name}_lora": Case(name, AS_USED[name], lora=True) for name in ("sft_go", "sftmix")}
    # An LM head that shares its weights, one with a bias, one process without a pair; and a reference to train
    cases |= {f"sftmix_{model}": Case("sftmix", AS_USED["sftmix"], model=model) for model in ("tied", "biased")}
    packed = {"packing": True, "max_length": 40, "per_device_train_batch_size": 1, "max_steps": 1, "seed": 5}
    cases["sftmix_packed"] = Case("sftmix", {**AS_USED["sftmix"], **packed}, rows="eight_tokens")
    cases["sftmix_reference"] = Case("sftmix")
    cases["sftmix_copied"] = Case("sftmix", is_loaded=True)
    cases["sftmix_online"] = Case("sftmix", {"confidence_source": "online", "max_steps": 6})
    answers = {**AS_USED["sftkey"], "answer_eval_steps": 2, "answer_eval_max_new_tokens": 6}
    cases["sftkey_answers"] = Case("sftkey", answers, eval_rows="texts")
    return cases | {f"{name}_found": case for name, case in scoring_cases(folder, "one").items()}


def scoring_cases(folder: Path, scores_of: str) -> dict[str, Case]:
    """Another model scores the data first, unless its scores are there."""
    reference, scores = str(folder / "reference"), {"score_cache_dir": str(folder / f"scores_of_{scores_of}")}
    # Few tokens in a batch, so that there are several for each process
    poft = {**scores, "reference_models": [reference], "reference_batch_tokens": 100}
    sft_go = {**scores, **AS_USED["sft_go"], "score_batch_tokens": 100}
    llmlingua2 = {"group_by": "llmlingua2", "importance_model": str(folder / "importance")}
    return {
        "poft_scored": Case("poft", poft, rows="unscored_texts"),
        "sft_go_rho1": Case("sft_go", {**sft_go, "group_by": "rho1", "reference_model": reference}),
        "sft_go_llmlingua2": Case("sft_go", {**sft_go, **llmlingua2}),
    }


def cases_in_bfloat16() -> dict[str, Case]:
    """Responses of more tokens than bfloat16 can count."""
    options = {"bf16": True, "max_length": 400, "max_steps": 1}
    cases = {
        name: Case(name, {**AS_USED[name], **options}, rows="long") for name in ("base", "sft_go", "poft", "sftmix")
    }
    cases["sftkey"] = Case("sftkey", {"stages": ["full"], "key_loss_weight": 3.7, **options}, rows="long")
    return {f"{name}_bf16": case for name, case in cases.items()}


def control_cases() -> dict[str, Case]:
    """Each method as what `SFTTrainer` is, and `SFTTrainer`, where two processes are not one."""
    cases = {}
    for name, options in (("uneven", UNEVEN), ("separate", SEPARATE_COUNTS)):
        for method, description in METHODS.items():
            cases[f"{name}_{method}"] = Case(method, {**description.control, **options}, control_rows(method))
        cases |= {f"{name}_sft_{rows}": Case("sft", options, rows) for rows in ("tokens", "equal_tokens")}
    return cases


def control_rows(method: str) -> str:
    return "equal_tokens" if method == "poft" else "tokens"


def resumed_cases() -> dict[str, Case]:
    return {f"{name}_resumed": Case(name, {**options, **SAVING}, resumes=name) for name, options in AS_USED.items()}


def make_trainer_of(case: Case, folder: Path, output_dir: Path, **options):
    """The trainer loads the model, as in `trl sft`: where weights are sharded, that is part of it."""
    model = str(folder / case.model)
    return make_trainer(
        *(SFT if case.method == "sft" else METHODS[case.method].classes),
        AutoModelForCausalLM.from_pretrained(model) if case.is_loaded else model,
        AutoTokenizer.from_pretrained(folder / case.model),
        load_rows(folder, case.rows),
        output_dir,
        eval_dataset=load_rows(folder, case.eval_rows) if case.eval_rows else None,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if case.lora else None,
        **{**STEPS, **case.options, **options},
    )


def load_rows(folder: Path, name: str) -> Dataset:
    return Dataset.from_json(str(folder / f"{name}.jsonl"), cache_dir=str(folder / "cache"))


def result_of(trainer) -> dict[str, Any]:
    """What is compared, all but flips of a sample since this process saw it last; to be called by all processes."""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    evaluation = trainer.evaluate() if trainer.eval_dataset is not None else {}
    names = [name for name in logs[-1] if name == "nll" or ("/" in name and name != "sft_go/flip_rate")]
    return {
        "losses": [log["loss"] for log in logs],
        "metrics": {name: logs[-1][name] for name in names},
        "evaluation": {name: value for name, value in evaluation.items() if name.endswith(("loss", "nll"))},
        "weights": trainer.accelerator.get_state_dict(trainer.model_wrapped),
        "halves": getattr(trainer, "halves", None),
        "answers": [
            callback._generate(callback.rows[""][0])
            for callback in trainer.callback_handler.callbacks
            if isinstance(callback, AnswerAccuracyCallback)
        ],
    }


def write_rows(folder: Path, token_rows: Dataset) -> None:
    """All data sets of the cases, and the one of the recipes."""
    texts = Dataset.from_list([text_row(row) for row in range(16)])
    texts.to_json(folder / "unscored_texts.jsonl")
    with_references(texts).to_json(folder / "texts.jsonl")
    with_references(texts).to_json(folder / "data" / "train.jsonl")
    token_rows.select(range(8)).to_json(folder / "eight_tokens.jsonl")
    token_rows.select(range(11)).to_json(folder / "tokens.jsonl")
    five_labels = [
        {"input_ids": ids, "labels": [-100] * (len(ids) - 5) + ids[-5:]}
        for ids in token_rows["input_ids"]
        if len(ids) > 5
    ]
    Dataset.from_list(five_labels[:11]).to_json(folder / "equal_tokens.jsonl")
    with_references(Dataset.from_list([long_row(row) for row in range(8)])).to_json(folder / "long.jsonl")


def text_row(row: int) -> dict[str, str]:
    completion = f"{' one more' * (row * 5 % 7 + 1)} is {row * 8}"
    return {"prompt": f"What is {row} plus {row * 7}?", "completion": completion, "answer": str(row * 8)}


def long_row(row: int) -> dict[str, list[int]]:
    length = 300 + 9 * row
    input_ids = [3 + (row + 1) * (position + 5) ** 2 % 290 for position in range(length)]
    return {
        "input_ids": input_ids,
        "labels": [-100] * 4 + input_ids[4:],
        "key_mask": [int(position > 20 * row + 20) for position in range(length)],
    }
