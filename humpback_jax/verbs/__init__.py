"""What each verb of the command line does: `verbs/VERB.py` has a function of that name.

It takes the parsed arguments, and returns what `--json` prints.
"""

from __future__ import annotations

import argparse
import importlib

from humpback_jax.compute import use_compilation_cache, use_cores
from humpback_jax.errors import HumpbackError
from humpback_jax.verbs.arguments import Result


def perform(arguments: argparse.Namespace) -> Result:
    """Does what the arguments ask for.

    Raises:
      HumpbackError: as the verb's function says, or as `start`.
    """
    start(arguments)
    name = arguments.function
    result: Result = getattr(importlib.import_module(f"{__name__}.{name}"), name)(arguments)
    return result


def start(arguments: argparse.Namespace) -> None:
    """Common to all verbs that compute.

    Raises:
      HumpbackError: the processes of a job do not find each other, or the verb takes only one.
    """
    if arguments.verb in ("fetch", "trace", "report"):
        return
    from humpback_jax.parallel.processes import join_processes

    use_cores()
    use_compilation_cache()
    in_many = arguments.verb in ("score", "train")
    in_many |= arguments.verb == "sample" and bool(arguments.prompts and arguments.out)
    if join_processes() > 1 and not in_many:
        raise HumpbackError(
            f"{arguments.verb} runs in one process; train, score, and sample with --prompts and "
            "--out, run in several."
        )
