#!/usr/bin/env bash
# Measures one NVIDIA GPU in less than ten minutes and writes benchmarks/gpu_DEVICE.json:
# decoding against the memory's bandwidth and prefill against the matmul rate, in the shapes of
# models of 1B and 7B parameters with random weights (nothing is downloaded); full tuning of 1B, beside
# torch, and of 8B; augmentation, beside transformers; and what each curator costs. Others are
# measured where a CUDA build of torch is installed.
#
#   pip install '.[cuda]' && benchmarks/gpu.sh
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m humpback_jax.bench.gpu "$@"
