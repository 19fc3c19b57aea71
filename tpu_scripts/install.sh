#!/usr/bin/env bash
# Installs humpback_jax for TPU into .venv of this clone. PYTHON=/path/to/python3 chooses the Python.
set -euo pipefail
cd "$(dirname "$0")/.."

# The first argument is a Python, new enough, that can import the modules of the second.
works() {
  "$1" -c "import sys, $2; sys.exit(sys.version_info < (3, 11))" 2>/dev/null
}

# python3 of Google's images is that of their Ubuntu: 3.10 on 22.04, and without ensurepip. Where uv
# puts others, a shell that is no login shell does not look.
PATH=$PATH:$HOME/.local/bin
candidates=("${PYTHON:-python3}")
if [ -z "${PYTHON:-}" ]; then
  candidates+=(python3.12 python3.13 python3.11)
fi

# The .venv of an older Python, or of one without ensurepip, is made anew.
if ! works .venv/bin/python pip; then
  chosen=
  for python in "${candidates[@]}"; do
    if works "$python" "ensurepip, venv"; then
      chosen=$python
      break
    fi
  done
  if [ -z "$chosen" ]; then
    echo "No Python 3.11 or newer with venv is here (tried: ${candidates[*]})." \
      "Install one: curl -LsSf https://astral.sh/uv/install.sh | sh &&" \
      "~/.local/bin/uv python install 3.12; or name one: PYTHON=/path/to/python3" >&2
    exit 1
  fi
  "$chosen" -m venv --clear .venv
fi
.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[tpu]'
