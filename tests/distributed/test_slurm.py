"""The Slurm script trains on two "machines" as one process does; `srun` and `scontrol` are stand-ins."""

import os
import subprocess
import sys
from pathlib import Path
from shlex import split

import pytest
import torch
import yaml
from helpers import SBATCH
from methods import METHODS, needs
from safetensors.torch import load_file

from hf_sft_variants.launch import training
from hf_sft_variants.quickstart import build_splits, write_data


ROOT = Path(__file__).parents[2]
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for machine in 0 1; do SLURM_NODEID=$machine "$@" & processes+=($!); done
for process in "${processes[@]}"; do wait "$process" || exit 1; done
"""


@pytest.fixture
def folder(tmp_path, tiny_model_factory, tokenizer, monkeypatch) -> Path:
    write_data(tmp_path / "data", build_splits(train_size=8, test_size=2))
    tiny_model_factory().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    keys = yaml.safe_load((ROOT / "recipes" / "quickstart" / "sft_go.yaml").read_text())
    keys |= {"model_name_or_path": "model", "dataset_name": "data", "optim": "sgd"}
    keys |= {"learning_rate": 0.1, "max_steps": 2, "lora_dropout": 0.0}
    (tmp_path / "RECIPE.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    (tmp_path / "bin").mkdir()
    for name, script in {"srun": SRUN, "scontrol": "#!/bin/bash\necho 127.0.0.1\n"}.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.distributed
@needs("sft_go")
def test_equal_to_one_process(folder):
    job = {
        "NNODES": "2",
        "GPUS_ON_NODE": "1",
        "JOB_NODELIST": "both",
        "CPUS_PER_TASK": "1",
        "JOB_ID": str(os.getpid()),
    }
    slurm = {f"SLURM_{name}": value for name, value in job.items()}
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **slurm, "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}
    flags = ["--output_dir", "two_machines", "--per_device_train_batch_size", "2"]
    launched = subprocess.run([*split(SBATCH)[1:], *flags], env=environment, capture_output=True, text=True)
    assert launched.returncode == 0, launched.stderr[-10_000:]

    flags = ["--output_dir", "one_process", "--per_device_train_batch_size", "4"]
    training.main(*METHODS["sft_go"].classes, ["--config", "RECIPE.yaml", *flags])
    expected = load_file("one_process/adapter_model.safetensors")
    weights_of_two = load_file("two_machines/adapter_model.safetensors")
    assert any(weights.abs().max() > 1e-3 for name, weights in weights_of_two.items() if "lora_B" in name)  # trained
    for name, weights in weights_of_two.items():
        torch.testing.assert_close(weights, expected[name], rtol=1e-5, atol=1e-6)
