"""The verb `humpback fetch`."""

from __future__ import annotations

import argparse

from humpback_jax.verbs.arguments import Result
from humpback_jax.weights.named import resolve


def fetch(arguments: argparse.Namespace) -> Result:
    """Brings a model into the cache."""
    found = resolve(arguments.name)
    print(f"{arguments.name}: {found.kind} at {found.path}")
    return {"name": arguments.name, "kind": found.kind, "path": str(found.path)}
