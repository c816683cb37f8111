"""Two gloo processes give the loss and the gradients of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_same_gradients, folder_of_all_workers, make_trainer, once, one_step, one_step_log, scores_in
from steps_of_two_processes import CLASSES

from hf_sft_variants import (
    PoFTConfig,
    PoFTTrainer,
    SFTGOConfig,
    SFTGOTrainer,
    SFTKeyConfig,
    SFTKeyTrainer,
    SFTMixConfig,
    SFTMixTrainer,
)


pytestmark = pytest.mark.distributed

# Eight rows in one optimizer step each; packed to four rows of at most 40 tokens
PADDED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
PACKED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "packing": True, "max_length": 40}
OWN_GROUPS = {"group_by": "column", "group_column": "mine"}
METHOD_OPTIONS = {
    "padded": {},
    "uniform": {"sample_weighting": "uniform"},
    "own_groups": OWN_GROUPS,
    "packed": PACKED,
    "packed_uniform": {**PACKED, **OWN_GROUPS, "sample_weighting": "uniform"},
}
SFTKEY_OPTIONS = {
    "key": {"stages": ["key"]},
    "key_and_full": {"stages": ["key"], "full_loss_weight": 0.3},
    "key_weighted": {"stages": ["full"], "key_loss_weight": 4.0},
    "key_packed": {**PACKED, "stages": ["key"]},
}
# Two steps with the whole response, two with the key, each stage with a warm-up
SFTKEY_STAGES = {"max_steps": 4, "learning_rate": 1e-2, "stage_learning_rates": [1e-2, 2e-3], "warmup_steps": 1}
POFT_OPTIONS = {
    "poft": {"beta": 2.0, "gamma": 0.5},
    "poft_packed": PACKED,
    "poft_uniform": {"preference_weighting": "uniform"},
}
SFTMIX_OPTIONS = {
    "sftmix": {"confidence_split": "random", "train_sampling_strategy": "random"},
    "sftmix_packed": {**PACKED, "confidence_split": "random"},
}
# Two epochs of two steps, after a reference that has as many; the checkpoint is inside the second epoch
SFTMIX_PHASES = {
    "max_steps": 4,
    "learning_rate": 0.1,
    "optim": "sgd",
    "save_strategy": "steps",
    "save_steps": 3,
    "train_sampling_strategy": "random",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
}
SFTMIX_RUNS = {"sftmix_phases": SFTMIX_PHASES, "sftmix_online": {**SFTMIX_PHASES, "confidence_source": "online"}}
RHO1 = {**PADDED, "group_by": "rho1", "score_batch_tokens": 40}
# Batches of three for each process: of five rows, or of eight packed into four, some are repeated
EVALUATIONS = {
    f"{name}_{layout}": (trainer, {**common, **options, "per_device_eval_batch_size": 3, "learning_rate": 0.0})
    for name, trainer, options in (
        ("sft_go", "SFTGOTrainer", {}),
        ("sftkey", "SFTKeyTrainer", {"stages": ["key"]}),
        ("poft", "PoFTTrainer", {}),
        ("sftmix", "SFTMixTrainer", SFTMIX_OPTIONS["sftmix"]),
    )
    for layout, common in (("padded", PADDED), ("packed", PACKED))
}
SEPARATE_COUNTS = {"average_tokens_across_devices": False}


@pytest.fixture(scope="module")
def eight_rows(token_rows):
    rows = token_rows.select(range(8))
    lengths = [len(ids) for ids in rows["input_ids"]]
    rows = rows.add_column("ref_logps", [[-5.0 - row / 4, -6.0 + row % 3] for row in range(len(rows))])
    rows = rows.add_column("key_mask", [[int(t >= length * 0.6) for t in range(length)] for length in lengths])
    return rows.add_column(
        "mine", [[(row + t) % (row % 3 + 1) for t in range(len(ids))] for row, ids in enumerate(rows["input_ids"])]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_factory, tokenizer):
    """Holds the model, and another one to be its reference."""
    folder = folder_of_all_workers(tmp_path_factory) / "two_processes"
    once(folder.with_suffix(".pt"), save_models, folder, tiny_model_factory(), tokenizer)
    return folder


def save_models(folder, model, tokenizer):
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model.model.embed_tokens.weight.data.mul_(1.1)
    model.save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "reference")


@pytest.fixture(scope="module")
def results(folder, eight_rows):
    return once(folder / "all_results.pt", launch_processes, folder, eight_rows)


def launch_processes(folder, eight_rows):
    """All cases in one launch."""
    eight_rows.to_json(folder / "rows.jsonl")
    cases = {
        name: {"trainer": "SFTGOTrainer", "options": {**PADDED, **options}} for name, options in METHOD_OPTIONS.items()
    }
    cases |= {
        name: {"trainer": "SFTKeyTrainer", "options": {**PADDED, **options}}
        for name, options in {**SFTKEY_OPTIONS, "key_stages": SFTKEY_STAGES}.items()
    }
    cases |= {
        name: {"trainer": "PoFTTrainer", "options": {**PADDED, **options}} for name, options in POFT_OPTIONS.items()
    }
    cases |= {
        name: {"trainer": "SFTMixTrainer", "options": {**PADDED, **options}}
        for name, options in SFTMIX_OPTIONS.items()
    }
    for name, options in SFTMIX_RUNS.items():
        cases[name] = {"trainer": "SFTMixTrainer", "options": options}
        cases[f"{name}_resumed"] = {**cases[name], "checkpoint": str(folder / "run" / "checkpoint-3")}
    cases["plain_separate"] = {"trainer": "SFTTrainer", "options": {**PADDED, **SEPARATE_COUNTS}}
    cases["ours_separate"] = {
        "trainer": "SFTGOTrainer",
        "options": {**PADDED, **SEPARATE_COUNTS, "worst_group_weight": 0},
    }
    cases["rho1"] = {"trainer": "SFTGOTrainer", "options": {**RHO1, **rho1_paths(folder, "scores_of_two")}}
    for name, (trainer, options) in EVALUATIONS.items():
        cases[f"evaluated_{name}"] = {"trainer": trainer, "options": options, "evaluated": num_evaluated(options)}
    (folder / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("steps_of_two_processes.py")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, folder],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )
    return torch.load(folder / "results.pt", weights_only=True)


def num_evaluated(options):
    return 8 if options.get("packing") else 5


def rho1_paths(folder, scores):
    return {"reference_model": str(folder / "reference"), "score_cache_dir": str(folder / scores)}


@pytest.mark.parametrize("case", METHOD_OPTIONS)
def test_equal_to_one_process(case, results, tiny_model, tokenizer, eight_rows, tmp_path):
    options = {**PADDED, **METHOD_OPTIONS[case]}
    options["gradient_accumulation_steps"] *= 2
    log, gradients = one_step_log(SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, eight_rows, tmp_path, **options)
    assert results[case]["log"]["loss"] == pytest.approx(log["loss"], rel=1e-6)
    assert_same_gradients(results[case]["gradients"], gradients, tolerance=1e-6)
    metrics = {name: value for name, value in log.items() if name == "nll" or name.startswith("sft_go/")}
    assert len(metrics) > 3
    assert {name: results[case]["log"][name] for name in metrics} == pytest.approx(metrics, rel=1e-6)


@pytest.mark.parametrize("case", SFTKEY_OPTIONS)
def test_sftkey_equal_to_one_process(case, results, tiny_model, tokenizer, eight_rows, tmp_path):
    options = {**PADDED, **SFTKEY_OPTIONS[case]}
    options["gradient_accumulation_steps"] *= 2
    log, gradients = one_step_log(SFTKeyTrainer, SFTKeyConfig, tiny_model, tokenizer, eight_rows, tmp_path, **options)
    assert results[case]["log"]["loss"] == pytest.approx(log["loss"], rel=1e-6)
    assert_same_gradients(results[case]["gradients"], gradients, tolerance=1e-6)
    metrics = {name: value for name, value in log.items() if name == "nll" or name.startswith("sftkey/")}
    assert len(metrics) > 3
    assert {name: results[case]["log"][name] for name in metrics} == pytest.approx(metrics, rel=1e-6)


@pytest.mark.parametrize("case", POFT_OPTIONS)
def test_poft_equal_to_one_process(case, results, tiny_model, tokenizer, eight_rows, tmp_path):
    options = {**PADDED, **POFT_OPTIONS[case]}
    options["gradient_accumulation_steps"] *= 2
    log, gradients = one_step_log(PoFTTrainer, PoFTConfig, tiny_model, tokenizer, eight_rows, tmp_path, **options)
    assert results[case]["log"]["loss"] == pytest.approx(log["loss"], rel=1e-6)
    assert_same_gradients(results[case]["gradients"], gradients, tolerance=1e-6)
    metrics = {name: value for name, value in log.items() if name == "nll" or name.startswith("poft/")}
    assert len(metrics) == (3 if case == "poft_uniform" else 12)
    assert {name: results[case]["log"][name] for name in metrics} == pytest.approx(metrics, rel=1e-5)


def test_sftkey_stages_equal_to_one_process(results, tiny_model, tokenizer, eight_rows, tmp_path):
    trainer = make_trainer(
        SFTKeyTrainer, SFTKeyConfig, tiny_model, tokenizer, eight_rows, tmp_path, save_strategy="no",
        train_sampling_strategy="sequential", per_device_train_batch_size=8, **SFTKEY_STAGES,
    )  # fmt: skip
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    assert rates == [0, 1e-2, 0, 2e-3] == results["key_stages"]["learning_rates"]
    weights = trainer.model.state_dict()
    # Adam makes steps of full size of tiny gradients, so rounding shows
    for name, values in results["key_stages"]["weights"].items():
        torch.testing.assert_close(values, weights[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", SFTMIX_OPTIONS)
def test_sftmix_equal_to_one_process(case, results, tiny_model, tokenizer, eight_rows, tmp_path):
    options = {**PADDED, **SFTMIX_OPTIONS[case]}
    options["gradient_accumulation_steps"] *= 2
    log, gradients = one_step_log(SFTMixTrainer, SFTMixConfig, tiny_model, tokenizer, eight_rows, tmp_path, **options)
    assert results[case]["log"]["loss"] == pytest.approx(log["loss"], rel=1e-6)
    assert_same_gradients(results[case]["gradients"], gradients, tolerance=1e-6)
    metrics = {name: value for name, value in log.items() if name == "nll" or name.startswith("sftmix/")}
    assert len(metrics) == 6
    assert {name: results[case]["log"][name] for name in metrics} == pytest.approx(metrics, rel=1e-6)


@pytest.mark.parametrize("case", SFTMIX_RUNS)
def test_sftmix_runs_equal_to_one_process(case, results, folder, tiny_model, tokenizer, eight_rows, tmp_path):
    options = {**SFTMIX_RUNS[case], "gradient_accumulation_steps": 2}
    trainer = make_trainer(SFTMixTrainer, SFTMixConfig, tiny_model, tokenizer, eight_rows, tmp_path, **options)
    trainer.train()
    assert torch.equal(trainer.halves, results[case]["halves"]) and trainer.halves.sum() == 4
    weights = trainer.model.state_dict()
    for name, values in results[case]["weights"].items():
        torch.testing.assert_close(values, weights[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(values, results[f"{case}_resumed"]["weights"][name])


@pytest.mark.parametrize("case", EVALUATIONS)
def test_rows_repeated_for_the_last_batch_do_not_count(case, results, tiny_model, tokenizer, eight_rows, tmp_path):
    name, options = EVALUATIONS[case]
    rows = eight_rows.select(range(num_evaluated(options)))
    trainer = make_trainer(*CLASSES[name], tiny_model, tokenizer, eight_rows, tmp_path, **options)
    metrics = {name: value for name, value in trainer.evaluate(rows).items() if name == "eval_nll" or "/" in name}
    assert len(metrics) >= (1 if "sftmix" in case else 4)
    evaluated = results[f"evaluated_{case}"]["evaluated"]
    assert {name: evaluated[name] for name in metrics} == pytest.approx(metrics, rel=1e-6)


def test_reference_scores_are_shared(results, folder, tiny_model, tokenizer, eight_rows, tmp_path):
    options = {**RHO1, **rho1_paths(folder, "scores_of_one"), "gradient_accumulation_steps": 4}
    loss, gradients = one_step(SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, eight_rows, tmp_path, **options)
    assert results["rho1"]["log"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(results["rho1"]["gradients"], gradients, tolerance=1e-6)
    by_one, by_two = (scores_in(folder / name) for name in ("scores_of_one", "scores_of_two"))
    assert by_one == by_two and [len(scores) for scores in by_one.values()] == [8]


def test_counts_of_each_process_alone_are_sft_trainers(results):
    plain, ours = results["plain_separate"], results["ours_separate"]
    assert ours["log"]["loss"] == plain["log"]["loss"]
    assert_same_gradients(ours["gradients"], plain["gradients"])
