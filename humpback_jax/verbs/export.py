"""The verb `humpback export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from humpback_jax.errors import HumpbackError
from humpback_jax.models import export_gguf, export_hf, export_peft, load_model
from humpback_jax.verbs.arguments import Result, adapted, writable_folder

GGUF = ".gguf"


def export(arguments: argparse.Namespace) -> Result:
    """A model for `transformers` or llama.cpp, or its adapter alone for `peft`."""
    out, kind = Path(arguments.out), arguments.format
    if arguments.base and kind != "peft":
        raise HumpbackError("--base names the base model of --format=peft.")
    names_file = out.suffix.lower() == GGUF and not out.is_dir()
    if names_file and kind != "gguf":
        raise HumpbackError(f"--out={out} is a GGUF file by its name; say --format=gguf.")
    model = adapted(load_model(arguments.model), arguments.adapter)
    writable_folder(out.parent if names_file else out)
    notes: list[str] = []
    if kind == "gguf":
        out = out if names_file else out / f"model{GGUF}"
        notes = export_gguf(out, model, arguments.dtype)
    elif kind == "peft":
        export_peft(out, model, arguments.base, arguments.dtype)
    else:
        export_hf(out, model, arguments.dtype)
    for note in notes:
        print(f"note: {note}")
    print(f"exported {arguments.model} to {out}")
    return {"out": str(out), "format": kind, "hash": model.hash, "notes": notes}
