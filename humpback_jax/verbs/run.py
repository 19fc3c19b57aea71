"""The verb `humpback run`."""

from __future__ import annotations

import argparse
from pathlib import Path

from humpback_jax import loop
from humpback_jax.config import load_config
from humpback_jax.errors import HumpbackError
from humpback_jax.overrides import apply_overrides
from humpback_jax.plan import dry_run
from humpback_jax.progress import timed_lines
from humpback_jax.report.build import build_report
from humpback_jax.report.tables import result_lines
from humpback_jax.verbs.arguments import Result, flag_as_field


def run(arguments: argparse.Namespace) -> Result:
    """The whole loop for a config, then its report."""
    if not arguments.config:
        raise HumpbackError("run needs --config=configs/FILE.py; configs/ holds the experiments.")
    flag_as_field(arguments, "limit", "corpus.limit")
    config = load_config(arguments.config)
    apply_overrides(config, arguments.overrides)
    workdir = Path(arguments.workdir)
    say = timed_lines()
    if arguments.dry_run:
        return dry_run(config, say)
    profile = Path(arguments.profile) if arguments.profile else None
    summary = loop.run(config, workdir, fresh=arguments.fresh, say=say, profile=profile)
    build_report(workdir)
    print()
    for line in result_lines(workdir):
        print(line)
    print(f"\nreport: {workdir / 'report' / 'index.html'}")
    return summary
