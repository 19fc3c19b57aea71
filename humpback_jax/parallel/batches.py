"""Training batches on a mesh: rows lie over data and fsdp, as does all that is computed of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from humpback_jax.model.shares import ROWS
from humpback_jax.parallel.rules import constrain, partition

Tree = TypeVar("Tree")


def row_parts(mesh: Mesh | None) -> int:
    """How many devices have rows of their own."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def keep_rows_apart(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """x [rows, ...], each device's rows on that device and nowhere else."""
    return constrain(x, mesh, P(ROWS))


def look_up(
    table: Callable[[jax.Array], jax.Array], tokens: jax.Array, mesh: Mesh | None
) -> jax.Array:
    """Embeddings of tokens [rows, T], on each device the columns that it has of the table.

    From there to a device's own rows is one exchange of activations. Left to itself, XLA puts the
    whole table together everywhere, adds up gradients of that size, and warns of its own plan.
    """
    if mesh is None:
        return table(tokens)
    x = table(constrain(tokens, mesh, partition(("rows", None), tokens.shape, mesh)))
    return constrain(x, mesh, partition(("rows", None, "embed"), x.shape, mesh))


def place_rows(read: Callable[[slice], Tree], count: int, mesh: Mesh | None, axis: int) -> Tree:
    """Arrays whose `count` rows lie along `axis`, onto the mesh.

    Args:
      read: gives the arrays of some of the rows, as numpy arrays. It is asked for those of this
        process's devices alone.
    """
    if mesh is None:
        return read(slice(0, count))

    def rows_of(index: Any) -> tuple[int, int]:
        start, stop, _ = index[axis].indices(count)
        return start, stop

    where = NamedSharding(mesh, P(*[None] * axis, ROWS))
    devices = where.addressable_devices_indices_map((1,) * axis + (count,)).values()
    ours = sorted({rows_of(index) for index in devices})

    def placed(*parts: np.ndarray) -> jax.Array:
        known = dict(zip(ours, parts, strict=True))
        shape = (*parts[0].shape[:axis], count, *parts[0].shape[axis + 1 :])
        return jax.make_array_from_callback(shape, where, lambda index: known[rows_of(index)])

    return jax.tree.map(placed, *(read(slice(*chosen)) for chosen in ours))
