"""Meshes of devices with the axes data, fsdp and tensor, and which part of them is ours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from humpback_jax.errors import HumpbackError

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis; `data` = 0 takes all that the others leave.

    Attributes:
      data: copies of the model, each with rows of its own.
      fsdp: parts of each matrix along the model's width.
      tensor: parts along the heads, the inner width of the MLP and the vocabulary.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1

    @property
    def replica(self) -> int:
        """Devices that hold one copy of the model."""
        return self.fsdp * self.tensor


def parse_mesh(text: str) -> MeshShape | None:
    """ "auto" -> None; "data=2,tensor=4" -> MeshShape(2, 1, 4).

    Raises:
      HumpbackError: an unknown axis, or a size that is not a positive whole number.
    """
    if text == "auto":
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise HumpbackError(
                f"mesh {text!r} is not understood at {part!r}; write auto, or sizes of some of the "
                f"axes {', '.join(AXES)}, e.g. data=2,tensor=4."
            )
        sizes[name] = int(size)
    return MeshShape(**sizes)


def one_copy(devices: int, kv_heads: int) -> MeshShape:
    """One copy of a model over so many devices: heads are never cut, so that fsdp gets the rest."""
    tensor = math.gcd(devices, kv_heads)
    return MeshShape(data=1, fsdp=devices // tensor, tensor=tensor)


def make_mesh(shape: MeshShape, devices: Sequence[Any]) -> Mesh:
    """The mesh of all `devices`.

    Raises:
      HumpbackError: they do not divide into the shape.
    """
    data = shape.data or len(devices) // shape.replica
    if data * shape.replica != len(devices):
        raise HumpbackError(
            f"the mesh data={shape.data or 'rest'}, fsdp={shape.fsdp}, tensor={shape.tensor} does "
            f"not fit {len(devices)} devices; the product of its sizes must be their number."
        )
    sizes = (data, shape.fsdp, shape.tensor)
    # An axis need not follow one of a slice's own: tensor=2 is half of a side of 4x4x4.
    grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def cut_rows_and_weights(devices: int, width: int) -> MeshShape:
    """All devices along fsdp, as far as they divide the model's width, and the rest along data."""
    fsdp = math.gcd(devices, width)
    return MeshShape(data=devices // fsdp, fsdp=fsdp)


def training_mesh(shape: MeshShape | None, width: int) -> Mesh | None:
    """The devices that train together, of all processes; None for a single one.

    Args:
      shape: None cuts rows and weights (`cut_rows_and_weights`) over all accelerators, and takes
        one CPU, or one of each process.
      width: of the model.

    Raises:
      HumpbackError: the devices do not divide into the shape.
    """
    devices = jax.devices()
    if shape is None:
        if devices[0].platform == "cpu":
            firsts = {device.process_index: device for device in reversed(devices)}
            devices = [firsts[process] for process in sorted(firsts)]
        shape = cut_rows_and_weights(len(devices), width)
    elif shape.data and jax.process_count() == 1:
        devices = devices[: shape.data * shape.replica]
    mesh = make_mesh(shape, devices)
    return mesh if mesh.size > 1 else None


@dataclasses.dataclass(frozen=True)
class Share:
    """This process's part in a job whose parts need nothing of each other.

    Attributes:
      meshes: of each copy of the model that the process drives, the devices that hold it together;
        None for JAX's default device.
      number, count: this part's, of so many.
      leads: whether this process writes the part's results; several may compute them together.
    """

    meshes: tuple[Mesh | None, ...] = (None,)
    number: int = 0
    count: int = 1
    leads: bool = True

    def takes(self, shard: int) -> bool:
        """Whether a shard of the job is ours: fixed beforehand, so that nobody waits."""
        return shard % self.count == self.number


def our_share(shape: MeshShape | None, parts: int = 1, kv_heads: int = 1) -> Share:
    """Splits all devices into copies of the model that work alone, and these among the processes.

    Args:
      shape: None puts a copy on each device; where it needs `parts` > 1 of them, on all
        accelerators of a host, or of as many hosts as it takes, and on a single CPU.
      kv_heads: of the model, see `one_copy`.

    Raises:
      HumpbackError: the devices do not divide into the shape.
    """
    local, number = jax.local_devices(), jax.process_index()
    if shape is None:
        shape = MeshShape()
        if parts > 1 and local[0].platform == "cpu":
            local = local[:1]
        elif parts > 1:
            shape = one_copy(max(parts, len(local)), kv_heads)
    elif shape.data:
        wanted = shape.data * shape.replica
        if wanted > jax.device_count():
            raise HumpbackError(
                f"the mesh takes {wanted} devices, here are {jax.device_count()}; choose smaller "
                "sizes, or leave data= out to take all devices."
            )
        if jax.process_count() == 1:
            local = local[:wanted]
        elif wanted < jax.device_count():
            raise HumpbackError(
                f"the mesh data={shape.data}, fsdp={shape.fsdp}, tensor={shape.tensor} takes "
                f"{wanted} of {jax.device_count()} devices; a job of several processes uses all. "
                "Choose other sizes, or leave data= out."
            )
    alone = dataclasses.replace(shape, data=1)
    if shape.replica <= len(local):
        if len(local) % shape.replica:
            make_mesh(shape, local)  # raises
        if len(local) == 1:
            return Share((None,), number, jax.process_count())
        starts = range(0, len(local), shape.replica)
        meshes = [make_mesh(alone, local[start : start + shape.replica]) for start in starts]
        return Share(tuple(meshes), number, jax.process_count())
    together, rest = divmod(shape.replica, len(local))
    if rest or jax.process_count() % together:
        raise HumpbackError(
            f"one copy of the model takes {shape.replica} devices, which is not a whole number of "
            f"hosts with {len(local)} each that divides all {jax.process_count()} of them."
        )
    ours, place = divmod(number, together)
    hosts = range(ours * together, (ours + 1) * together)
    devices = [device for device in jax.devices() if device.process_index in hosts]
    mesh = make_mesh(alone, devices)
    return Share((mesh,), ours, jax.process_count() // together, leads=place == 0)


def axis_size(mesh: Mesh | None, axis: str) -> int:
    """Devices along an axis; 1 without a mesh."""
    return 1 if mesh is None else int(mesh.shape[axis])
