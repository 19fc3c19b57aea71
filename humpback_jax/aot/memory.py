"""What compiled programs hold on a device, by kind, and whether that fits."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax

from humpback_jax.device_memory import shortage
from humpback_jax.parallel.topology import Chip


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program, or None where it does not fit, with the seconds that took.

    refused: bytes of a device that the compiler found the program to need, where it gave up;
      `beside`: next to its arguments.
    """

    program: Any
    seconds: float
    refused: int = 0
    beside: bool = False


def compile_program(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles, and takes the compiler's word for what does not fit.

    Raises:
      jax.errors.JaxRuntimeError: anything else went wrong.
    """
    started = time.monotonic()
    try:
        return Compiled(lowered.compile(), round(time.monotonic() - started, 1))
    except jax.errors.JaxRuntimeError as error:
        lacking = shortage(error)
        if lacking is None:
            raise
        return Compiled(None, round(time.monotonic() - started, 1), lacking.bytes, lacking.beside)


def bytes_report(compiled: Compiled, arguments: dict[str, Any], chip: Chip) -> dict[str, Any]:
    """Of the fullest device; donated arguments are counted once.

    Args:
      arguments: the program's large inputs by kind, abstract, with their shardings.

    Returns:
      bytes_per_device, bytes_by_kind, hbm_bytes, fits, compile_s. "activations" is all that lives
      within the program, "gradients" apart where `arguments` names them.
    """
    kinds = {kind: held_bytes(tree) for kind, tree in arguments.items()}
    inside = kinds.get("gradients", 0)
    outside = sum(kinds.values()) - inside
    if compiled.program is None:
        total = compiled.refused + compiled.beside * outside
        kinds["activations"] = max(total - outside - inside, 0)
    else:
        analysis = compiled.program.memory_analysis()
        kinds["other_arguments"] = max(analysis.argument_size_in_bytes - outside, 0)
        kinds["activations"] = max(analysis.temp_size_in_bytes - inside, 0)
        kinds["results"] = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        kinds["code"] = analysis.generated_code_size_in_bytes
        total = sum(kinds.values())
    return {
        "bytes_per_device": total,
        "bytes_by_kind": kinds,
        "hbm_bytes": chip.memory,
        "fits": compiled.program is not None and total <= chip.memory,
        "compile_s": compiled.seconds,
    }


def held_bytes(tree: Any) -> int:
    """Of abstract arrays with shardings, on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
