"""The verb `humpback import`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from humpback_jax.models import load_model, load_peft, save_checkpoint
from humpback_jax.verbs.arguments import Result, adapted, own_folder
from humpback_jax.weights.named import resolve


def import_model(arguments: argparse.Namespace) -> Result:
    """Any model that we can name, or a PEFT adapter on its base, as one of our checkpoints."""
    if not arguments.base:
        model = load_model(arguments.source)
    elif (found := resolve(arguments.source)).kind == "peft":
        model = load_peft(found.path, arguments.base)
    else:
        base = dataclasses.replace(load_model(arguments.base), adapter=None)  # which it keeps
        model = adapted(base, arguments.source)
    out = Path(arguments.out)
    with own_folder(out):
        details = {"source": arguments.source}
        save_checkpoint(out, dataclasses.replace(model, name=out.name), details)
    print(f"imported {arguments.source} to {out}")
    return {"out": str(out), "hash": model.hash}
