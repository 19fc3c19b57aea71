"""TPU slices that need not be there: devices to compile for, and what their chips can do."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from humpback_jax.errors import HumpbackError

GIB = 1024**3


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device: memory in bytes, its bandwidth in bytes/s, bfloat16 products in FLOP/s.

    links: bytes/s that it can send to its neighbours, over all of its links together.
    share: of `flops` that the products of a training step reach.
    """

    memory: int
    bandwidth: float
    flops: float
    links: float
    share: float


# Google's published figures (cloud.google.com/tpu/docs, pages of each version). Links: 2,400 Gbit/s
# (v4), 400 GB/s both ways together (v5e), 4,800 Gbit/s (v5p), 800 GB/s both ways together (v6e).
# The shares are ours: v5p's and v6e's are such that steps published by MaxText come out right
# (`aot/published.py`), the others' lower than v5p's by as much as the MFU of Llama-2-70B that its
# Run_Llama2.md reports (57 % on v4 and v5e, 65 % on v5p).
CHIPS = {
    "v4": Chip(32 * GIB, 1.228e12, 275e12, 300e9, 0.7),
    "v5e": Chip(16 * GIB, 0.819e12, 197e12, 200e9, 0.7),
    "v5p": Chip(95 * GIB, 2.765e12, 459e12, 600e9, 0.8),
    "v6e": Chip(32 * GIB, 1.64e12, 918e12, 400e9, 0.55),
}


def tpu_slice(text: str) -> tuple[list[Any], Chip]:
    """The devices of a slice, e.g. "v5p:2x2x1", for ahead-of-time compilation on any machine.

    Raises:
      HumpbackError: an unknown kind or shape, or TPU support is not installed.
    """
    kind, _, shape = text.partition(":")
    if kind not in CHIPS or not shape:
        raise HumpbackError(
            f"--topology={text} is not known; write KIND:SHAPE with a kind of "
            f"{', '.join(CHIPS)}, e.g. v5e:2x4 or v5p:2x2x1."
        )
    # There is no TPU to ask about, or that processes which compile could take from each other.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=text, **options)
    except Exception as error:
        raise HumpbackError(
            f"--topology={text}: no such slice, or TPU support is not installed "
            f"(in the clone: pip install -c constraints.txt -e '.[tpu]'): {error}"
        ) from error
    return list(found.devices), CHIPS[kind]
