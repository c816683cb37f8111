"""Two gloo processes give the loss and the gradients of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_same_gradients, one_step, one_step_log

from hf_sft_variants import SFTGOConfig, SFTGOTrainer


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
RHO1 = {**PADDED, "group_by": "rho1", "score_batch_tokens": 40}
SEPARATE_COUNTS = {"average_tokens_across_devices": False}


@pytest.fixture(scope="module")
def eight_rows(token_rows):
    rows = token_rows.select(range(8))
    return rows.add_column(
        "mine", [[(row + t) % (row % 3 + 1) for t in range(len(ids))] for row, ids in enumerate(rows["input_ids"])]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_factory, tokenizer):
    """Holds the model, and another one to be its reference."""
    folder = tmp_path_factory.mktemp("two_processes")
    model = tiny_model_factory()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model.model.embed_tokens.weight.data.mul_(1.1)
    model.save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "reference")
    return folder


@pytest.fixture(scope="module")
def results(folder, eight_rows):
    eight_rows.to_json(folder / "rows.jsonl")
    cases = {
        name: {"trainer": "SFTGOTrainer", "options": {**PADDED, **options}} for name, options in METHOD_OPTIONS.items()
    }
    cases["plain_separate"] = {"trainer": "SFTTrainer", "options": {**PADDED, **SEPARATE_COUNTS}}
    cases["ours_separate"] = {
        "trainer": "SFTGOTrainer",
        "options": {**PADDED, **SEPARATE_COUNTS, "worst_group_weight": 0},
    }
    cases["rho1"] = {"trainer": "SFTGOTrainer", "options": {**RHO1, **rho1_paths(folder, "scores_of_two")}}
    (folder / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("steps_of_two_processes.py")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, folder],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )
    return torch.load(folder / "results.pt", weights_only=True)


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


def test_reference_scores_are_shared(results, folder, tiny_model, tokenizer, eight_rows, tmp_path):
    options = {**RHO1, **rho1_paths(folder, "scores_of_one"), "gradient_accumulation_steps": 4}
    loss, gradients = one_step(SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, eight_rows, tmp_path, **options)
    assert results["rho1"]["log"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(results["rho1"]["gradients"], gradients, tolerance=1e-6)
    (by_one,), (by_two,) = ((folder / name).iterdir() for name in ("scores_of_one", "scores_of_two"))
    assert by_one.name == by_two.name and by_one.read_bytes() == by_two.read_bytes()


def test_counts_of_each_process_alone_are_sft_trainers(results):
    plain, ours = results["plain_separate"], results["ours_separate"]
    assert ours["log"]["loss"] == plain["log"]["loss"]
    assert_same_gradients(ours["gradients"], plain["gradients"])
