#!/usr/bin/env bash
# Installs humpback_jax on one Cloud TPU VM (a single host) and runs an experiment there.
#
#   tpu_scripts/run_on_vm.sh --config=configs/humpback.py:llama2_7b --workdir=runs/humpback
#
# Run it on the VM, in a clone. The same command again continues the run. For slices of several
# hosts there is run_on_slice.sh.
set -euo pipefail

clone=$(cd "$(dirname "$0")/.." && pwd)
"$clone/tpu_scripts/install.sh"
exec "$clone/.venv/bin/humpback" run "$@"
