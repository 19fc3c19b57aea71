"""What a compiled program moves between devices, read from its text."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# The result's type, the kind, and what follows. Of an asynchronous pair the start counts.
OPERATION = re.compile(rf"= (\(?[a-z0-9]+\[.*?) ({'|'.join(KINDS)})(-start)?\((.*)")
# A sum of which each device keeps a part is, on TPU, one operation that is written as two.
FUSED_SCATTER = "%all-reduce-scatter"
# An exchange beside products is written once for each piece of it, inside fusions.
FUSIONS = ("%fused_computation", "%async_collective_fusion")
CHANNEL = re.compile(r"channel_id=(\d+)")
# TPU's algorithms that exchange along all sides of a slice at once.
ALL_SIDES = re.compile(r'"strategy":"\w*ND')
SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
COUNTED_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# Axes of a mesh, as in mesh['a'=2,'b'=8] {'b'}, part of one as in {'b':(1)4}, and the order of its
# devices, where that is not theirs.
MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{('.*?)\}"
)
MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")
GROUP_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
BITS = re.compile(r"\d+$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange.

    Attributes:
      arrays: (dtype, dimensions) of a device's results.
      group: the first devices that exchange with each other, as numbers in the order of the mesh;
        none for a permutation.
      bytes: that a device sends, where each group exchanges along a ring.
      all_sides: whether they go along all sides of a slice at once.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    group: tuple[int, ...]
    bytes: float
    all_sides: bool


def collectives(program: str) -> list[Collective]:
    """All exchanges in the text of a compiled program; those of a loop are listed once."""
    found, scatters, fused = [], False, False
    channels: set[str] = set()
    for line in program.splitlines():
        if line.endswith("{"):  # a computation begins
            scatters, fused = line.startswith(FUSED_SCATTER), line.startswith(FUSIONS)
        match = OPERATION.search(line)
        if match is None:
            continue
        result, kind, start, rest = match.groups()
        if fused and (channel := CHANNEL.search(rest)):
            if channel[1] in channels:
                continue
            channels.add(channel[1])
        arrays = [
            (dtype, tuple(int(size) for size in sizes.split(",") if size))
            for dtype, sizes in SHAPE.findall(result)
        ]
        if start and kind != "all-reduce" and len(arrays) > 1:
            arrays = arrays[1:2]  # (operand, result, contexts ...)
        group = () if kind == "collective-permute" else _group(rest)
        devices = len(group)
        size = sum(map(_bytes, arrays))
        if scatters and kind == "all-reduce":
            kind, size = "reduce-scatter", size // devices
        sent, all_sides = _sent(kind, size, devices), ALL_SIDES.search(rest) is not None
        found.append(Collective(kind, tuple(arrays), group, sent, all_sides))
    return found


def _group(rest: str) -> tuple[int, ...]:
    """The first group."""
    if match := LISTED_GROUPS.search(rest):
        return _numbers(match[1])
    if match := COUNTED_GROUPS.search(rest):
        return tuple(_ordered(match[2], match[3]).reshape(_numbers(match[1]))[0].tolist())
    match = MESH_GROUPS.search(rest)
    if match is None:
        raise ValueError(f"groups of devices in a form that is not known: {rest[:200]}")
    axes = {name: int(size) for name, size in MESH_AXIS.findall(match[1])}
    order = match[2] or ",".join(map(str, axes.values()))
    taken = {
        name: (int(before or 1), int(size or axes[name]))
        for name, before, size in GROUP_AXIS.findall(match[4])
    }
    sizes: list[int] = []
    index: list[int | slice] = []
    for name, size in axes.items():
        before, part = taken.get(name, (size, 1))
        sizes += [before, part, size // (before * part)]
        index += [0, slice(None), 0]
    return tuple(_ordered(order, match[3]).reshape(sizes)[tuple(index)].ravel().tolist())


def _ordered(sizes: str, axes: str | None) -> np.ndarray:
    """All devices' numbers in an array of these sizes, its axes then in this order."""
    shape = _numbers(sizes)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose(_numbers(axes)) if axes else numbers


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


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
