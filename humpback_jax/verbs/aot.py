"""The verb `humpback aot`."""

from __future__ import annotations

import argparse
from pathlib import Path

from humpback_jax.aot.programs import ALL, compile_for
from humpback_jax.aot.suggest import suggest_for
from humpback_jax.aot.summary import summary_lines
from humpback_jax.aot.table import fill_table
from humpback_jax.artifacts import write_json
from humpback_jax.errors import HumpbackError
from humpback_jax.progress import timed_lines
from humpback_jax.verbs.arguments import Result, chosen_config, flag_as_field

# What decides on the programs; the longest document and answer decide on a row's places.
READS = ("base", "train", "compute", "corpus.max_chars", "augment.max_new_tokens")


def aot(arguments: argparse.Namespace) -> Result:
    """Compiles a config's programs for a TPU slice; prints what they need there."""
    _refuse_unread(arguments)
    if arguments.table:
        return fill_table(Path(arguments.table), arguments.only, timed_lines())
    if not arguments.topology:
        raise HumpbackError("aot needs --topology=KIND:SHAPE, e.g. v5p:2x2x1, or --table=FILE.")
    if arguments.rows is not None and arguments.rows < 1:
        raise HumpbackError(f"--rows={arguments.rows} has to be 1 or more.")
    flag_as_field(arguments, "lora", "train.lora.rank")
    config = chosen_config(arguments, READS)
    if arguments.suggest:
        result = suggest_for(config, arguments.topology, timed_lines())
    else:
        names = arguments.programs or ALL
        result = compile_for(config, arguments.topology, arguments.rows, names)
    for line in summary_lines(result):
        print(line)
    if arguments.out:
        write_json(Path(arguments.out), result)
    return result


def _refuse_unread(arguments: argparse.Namespace) -> None:
    """Refuses flags that nothing would read: they would look as if they had been heeded."""
    if arguments.table:
        flags = ["config", "topology", "model", "programs", "rows", "lora", "suggest", "out"]
        reason = "beside --table, whose rows have settings of their own"
        fields = [*arguments.overrides]
    elif arguments.suggest:
        flags, reason = (
            ["only", "programs", "rows"],
            "beside --suggest, which searches for training",
        )
        fields = ["compute.mesh", "train.remat", "train.accumulation"]
    elif arguments.programs and "train" not in arguments.programs:
        flags, reason = ["only", "rows", "lora"], "where --programs leaves train out"
        fields = [key for key in arguments.overrides if key.startswith("train.")]
    else:
        flags, reason, fields = ["only"], "without --table", []
    given = [flag for flag in flags if getattr(arguments, flag) not in (None, "", [], False)]
    given += [f"config.{key}" for key in fields if key in arguments.overrides]
    if given:
        raise HumpbackError(f"--{given[0]} has no effect {reason}.")
