"""Two machines that share nothing but the network: each method trains there as on one process."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import save_models, scores_in
from methods import needs
from two_machines import CASES, load, train


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_factory, tokenizer):
    """A folder for each machine, with copies of models and data that were made at other times."""
    folder = tmp_path_factory.mktemp("two_machines")
    save_models(folder / "0", tiny_model_factory(), tokenizer)
    rows = [
        {"prompt": f"What is {row} plus {row * 7}?", "completion": f"{' add' * (row % 3 + 1)} it\n#### {row * 8}"}
        for row in range(8)
    ]
    Dataset.from_list(rows).to_json(folder / "0" / "rows.jsonl")
    for copy in ("1", "one_process"):
        shutil.copytree(folder / "0", folder / copy, copy_function=shutil.copy)
    for machine, kept in (("0", "model"), ("1", "reference")):  # of one name, but not the same
        shutil.copytree(folder / machine / kept, folder / machine / "different")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    script = str(Path(__file__).with_name("two_machines.py"))
    machines = [
        subprocess.Popen(
            [*launch, "--machine_rank", name, script, str(folder / name)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / name / "home")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("0", "1")
    ]
    outputs = [machine.communicate()[0] for machine in machines]
    for machine, output in zip(machines, outputs, strict=True):
        assert machine.returncode == 0, output[-10_000:]
    return [torch.load(folder / name / "results.pt", weights_only=True) for name in ("0", "1")]


@pytest.mark.parametrize("case", CASES)
def test_equal_to_one_process(case, results, folder, monkeypatch):
    monkeypatch.chdir(folder / "one_process")
    options = {"score_cache_dir": "scores"} if case in ("rho1", "poft") else {}
    expected = train(case, *load(), gradient_accumulation_steps=2, **options)
    for result in (machine[case] for machine in results):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert (result["halves"] is None) or torch.equal(result["halves"], expected["halves"])
        for name, values in result["weights"].items():
            torch.testing.assert_close(values, expected["weights"][name], rtol=1e-5, atol=1e-6)


@needs("sft_go")
def test_each_machine_has_the_scores(results, folder):
    """Also after one has lost them: they were sent, not made again."""
    ours, theirs = (scores_in(folder / name / "home" / "hf_sft_variants" / "scores") for name in ("0", "1"))
    (rho1,) = theirs
    assert theirs[rho1] == ours[rho1] and len(ours[rho1]) == 8
    assert all(machine["rho1_served"]["losses"] == machine["rho1"]["losses"] for machine in results)


@needs("sft_go")
def test_all_machines_wait_while_one_finds_a_lock(results):
    assert [machine["rho1_waited"]["tries"] for machine in results] == [3, 0]
    assert all(machine["rho1_waited"]["losses"] == machine["rho1"]["losses"] for machine in results)


@needs("sft_go", "poft")
def test_what_differs_is_refused_on_all_machines(results):
    for machine in results:
        assert "Process 1 disagrees with the main process on `version`" in machine["other_model"]
        assert "Process 1 disagrees with the main process on `examples`" in machine["other_data"]
