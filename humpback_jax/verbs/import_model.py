"""The verb `humpback import`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from humpback_jax.models import load_model, save_checkpoint
from humpback_jax.verbs.arguments import Result, adapted, writable_folder


def import_model(arguments: argparse.Namespace) -> Result:
    """Any model that we can name, or a PEFT adapter on its base, as one of our checkpoints."""
    if arguments.base:
        base = dataclasses.replace(load_model(arguments.base), adapter=None)  # which it keeps
        model = adapted(base, arguments.source)
    else:
        model = load_model(arguments.source)
    out = Path(arguments.out)
    writable_folder(out)
    save_checkpoint(out, dataclasses.replace(model, name=out.name), {"source": arguments.source})
    print(f"imported {arguments.source} to {out}")
    return {"out": str(out), "hash": model.hash}
