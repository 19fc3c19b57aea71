"""One program for several copies of the model: each works on its own rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def per_replica(
    function: Callable[..., Any], mesh: Mesh | None, batched: Sequence[bool]
) -> Callable[..., Any]:
    """`function`, computed for each copy along the axis data.

    The axes fsdp and tensor are left to the compiler, which follows where the parameters lie.

    Args:
      batched: of each argument, whether the leading axis of its arrays holds the rows of all
        copies, one after the other; other arguments are the same for all. Results are batched.
    """
    if mesh is None or not _copied(mesh):
        return function
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(P("data") if rows else P() for rows in batched),
        out_specs=P("data"),
        axis_names={"data"},
        check_vma=False,
    )


def over_replicas(count: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The sum over all copies, inside `per_replica`; what they branch on must be the same."""
    return count if mesh is None or not _copied(mesh) else jax.lax.psum(count, "data")


def whole(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Inside `per_replica`: x on every device of the copy, not in parts."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, P() if _copied(mesh) else NamedSharding(mesh, P()))


def _copied(mesh: Mesh) -> bool:
    """Whether there are several copies; a single one needs no axis cut by hand."""
    return mesh.shape["data"] > 1
