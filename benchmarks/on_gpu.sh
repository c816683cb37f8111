#!/usr/bin/env bash
# What only a GPU can tell, in under eight minutes: the kernels against torch, the head alone, whole steps and memory.
#     benchmarks/on_gpu.sh FOLDER    # for the results
set -euo pipefail
cd "$(dirname "$0")/.."
results=$1
mkdir -p "$results"

TRITON_INTERPRET=0 python -m pytest -q tests/lm_head/test_kernels.py
timeout 150 python benchmarks/lm_head.py --output "$results/lm_head_gpu.json"
timeout 150 python benchmarks/step_overhead.py --vocab_sizes 128256 --length 1024 --lora --pairs 8 \
    --methods sft_go sftmix --output "$results/step_overhead_lora_gpu.json"
timeout 120 python benchmarks/step_overhead.py --vocab_sizes 128256 --length 1024 --packing on --pairs 8 \
    --methods sft_go sftmix --output "$results/step_overhead_packed_gpu.json"
