"""The verb `humpback export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from humpback_jax.errors import HumpbackError
from humpback_jax.models import export_hf, export_peft, load_model
from humpback_jax.verbs.arguments import Result, adapted, writable_folder


def export(arguments: argparse.Namespace) -> Result:
    """A model, or its adapter alone, as a folder that `transformers` or `peft` loads."""
    if arguments.base and arguments.format != "peft":
        raise HumpbackError("--base names the base model of --format=peft.")
    model = adapted(load_model(arguments.model), arguments.adapter)
    out = Path(arguments.out)
    writable_folder(out)
    if arguments.format == "peft":
        export_peft(out, model, arguments.base, arguments.dtype)
    else:
        export_hf(out, model, arguments.dtype)
    print(f"exported {arguments.model} to {out}")
    return {"out": str(out), "format": arguments.format, "hash": model.hash}
