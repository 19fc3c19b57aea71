"""The verb `humpback verify`."""

from __future__ import annotations

import argparse

from humpback_jax.progress import timed_lines
from humpback_jax.verbs.arguments import Result, run_folder
from humpback_jax.verification import verify_run


def verify(arguments: argparse.Namespace) -> Result:
    """Recomputes hashes and a slice; `ok` is False and the exit code 1 when anything differs."""
    result = verify_run(run_folder(arguments), timed_lines())
    print("everything agrees" if result["ok"] else "differs: " + "; ".join(result["differs"]))
    return result
