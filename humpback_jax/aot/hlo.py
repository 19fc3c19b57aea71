"""What a compiled program moves between devices, read from its text."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# The result's type, the kind, and what follows. Of an asynchronous pair the start counts.
OPERATION = re.compile(rf"= (\(?[a-z0-9]+\[.*?) ({'|'.join(KINDS)})(-start)?\((.*)")
# A sum of which each device keeps a part is, on TPU, one operation that is written as two.
FUSED_SCATTER = "%all-reduce-scatter"
SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
COUNTED_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
# Axes of a mesh, as in mesh['a'=2,'b'=8] {'b'}; part of one as in {'b':(1)4}.
MESH_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\].*?\{('.*?)\}")
MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")
GROUP_AXIS = re.compile(r"'(\w+)'(?::\(\d+\)(\d+))?")
BITS = re.compile(r"\d+$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange: kind, arrays as (dtype, dimensions) of a device's result, devices in a group.

    bytes: that a device sends, where each group exchanges along a ring.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    devices: int
    bytes: float


def collectives(program: str) -> list[Collective]:
    """All exchanges in the text of a compiled program; those of a loop are listed once."""
    found, scatters = [], False
    for line in program.splitlines():
        if line.endswith("{"):  # a computation begins
            scatters = line.startswith(FUSED_SCATTER)
        match = OPERATION.search(line)
        if match is None:
            continue
        result, kind, start, rest = match.groups()
        arrays = [
            (dtype, tuple(int(size) for size in sizes.split(",") if size))
            for dtype, sizes in SHAPE.findall(result)
        ]
        if start and kind != "all-reduce" and len(arrays) > 1:
            arrays = arrays[1:2]  # (operand, result, contexts ...)
        devices = _group(rest)
        size = sum(map(_bytes, arrays))
        if scatters and kind == "all-reduce":
            kind, size = "reduce-scatter", size // devices
        found.append(Collective(kind, tuple(arrays), devices, _sent(kind, size, devices)))
    return found


def bytes_by_kind(found: Iterable[Collective]) -> dict[str, float]:
    """Bytes that a device sends, by kind of collective."""
    sums: dict[str, float] = collections.defaultdict(float)
    for each in found:
        sums[each.kind] += each.bytes
    return dict(sums)


def _group(rest: str) -> int:
    if match := COUNTED_GROUPS.search(rest):
        return int(match[2])
    if match := LISTED_GROUPS.search(rest):
        return match[1].count(",") + 1
    if match := MESH_GROUPS.search(rest):
        sizes = dict(MESH_AXIS.findall(match[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in GROUP_AXIS.findall(match[2]))
    return 2  # a permutation has pairs


def _bytes(array: tuple[str, tuple[int, ...]]) -> int:
    dtype, sizes = array
    bits = BITS.search(dtype)
    return math.prod(sizes) * (int(bits[0]) if bits else 8) // 8


def _sent(kind: str, size: int, devices: int) -> float:
    """Of a result of so many bytes, by a ring."""
    match kind:
        case "all-gather" | "all-to-all":
            return size * (devices - 1) / devices
        case "reduce-scatter":
            return float(size * (devices - 1))
        case "all-reduce":
            return 2 * size * (devices - 1) / devices
        case _:
            return float(size)
