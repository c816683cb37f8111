#!/bin/bash
# Trains on several machines with Slurm. Adapt the resources below to your cluster; then, in the folder that contains
# `recipes/`, with the environment activated:
#
#     sbatch recipes/accelerate/slurm.sh recipes/accelerate/fsdp2.yaml hf_sft_variants.sft_go --config RECIPE.yaml
#
# The arguments are a config of this folder, the recipe's `module`, and then what `trl sft` would be given. The keys
# above `module` in the recipe do not apply.
#SBATCH --job-name=sft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1             # one launcher on each machine, which starts a process for each of its GPUs
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=%x-%j.log
set -euo pipefail

export CONFIG=$1
export NUM_PROCESSES=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))
MAIN_MACHINE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_MACHINE MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a machine need different ports

# If one machine fails, the others stop too, instead of waiting for it
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    accelerate launch --config_file "$CONFIG" --num_machines "$SLURM_NNODES" --num_processes "$NUM_PROCESSES" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_MACHINE" --main_process_port "$MAIN_PORT" -m "$@"
' bash "${@:2}"
