"""Training batches on a mesh: rows lie over data and fsdp, as does all that is computed of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from humpback_jax.model.shares import ROWS
from humpback_jax.parallel.rules import constrain, partition


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


def place_rows(array: jax.Array, mesh: Mesh | None, axis: int) -> jax.Array:
    """An array of the host that all processes know, whose rows lie along `axis`, onto the mesh."""
    if mesh is None:
        return array
    where = NamedSharding(mesh, P(*[None] * axis, ROWS))
    return jax.make_array_from_callback(array.shape, where, array.__getitem__)
