"""The verb `humpback trace`."""

from __future__ import annotations

import argparse
import json

from humpback_jax.lineage import trace_id
from humpback_jax.verbs.arguments import Result, run_folder


def trace(arguments: argparse.Namespace) -> Result:
    """Prints the lineage of one id."""
    result = trace_id(run_folder(arguments), arguments.id)
    if not arguments.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return result
