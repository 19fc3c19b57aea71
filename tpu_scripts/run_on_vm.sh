#!/usr/bin/env bash
# Installs humpback_jax on one Cloud TPU VM (a single host) and runs an experiment there.
#
#   tpu_scripts/run_on_vm.sh --config=configs/humpback.py:llama2_7b --workdir=runs/humpback
#
# Run it from the root of a clone, on the VM. The same command again continues the run.
set -euo pipefail

python3 -m venv .venv
.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[tpu]'
exec .venv/bin/humpback run "$@"
