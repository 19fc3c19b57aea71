"""The verb `humpback report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from humpback_jax.report.build import build_report
from humpback_jax.verbs.arguments import Result, run_folder


def report(arguments: argparse.Namespace) -> Result:
    """Rewrites the report of a run from its artifacts."""
    path = build_report(run_folder(arguments))
    print(f"report: {path}")
    if arguments.readme:
        from humpback_jax.report.readme import write_results

        write_results(Path(arguments.readme), Path(arguments.workdir))
    return {"report": str(path)}
