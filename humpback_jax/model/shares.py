"""How the devices of a mesh share attention: no kernel can be cut by XLA, so that we cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

ROWS = ("data", "fsdp")  # the mesh axes that rows are cut over
HEADS = "tensor"


class Shares(NamedTuple):
    """Rows are cut over the axes `rows` of the mesh, heads over `heads`; without a mesh, nothing.

    Axes of the mesh that are not named hold copies.
    """

    mesh: Mesh | None
    rows: tuple[str, ...] = ()
    heads: str | None = None

    @classmethod
    def of(cls, mesh: Mesh | None, rows: int, groups: int) -> Shares:
        """As many axes as divide the rows, and the key/value heads, evenly."""
        if mesh is None:
            return cls(None)
        fits = HEADS in mesh.shape and groups % mesh.shape[HEADS] == 0
        axes: tuple[str, ...] = ()
        for name in ROWS:
            size = math.prod(mesh.shape[axis] for axis in (*axes, name) if axis in mesh.shape)
            if name in mesh.shape and rows % size == 0:
                axes = (*axes, name)
        return cls(mesh, axes, HEADS if fits else None)

    @property
    def tokens(self) -> P:
        """Of [B, T, H, K] and [B, T, G, K]."""
        return P(self.rows, None, self.heads)

    @property
    def by_row(self) -> P:
        """Of [B, ...]."""
        return P(self.rows)

    @property
    def cache(self) -> P:
        """Of [B, G, ...]."""
        return P(self.rows, self.heads)

    @property
    def by_group(self) -> P:
        """Of [G, ...]."""
        return P(self.heads)

    def run(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """`function` of each device's share of the arguments."""
        if self.mesh is None:
            return function
        # Kernels do not say over which axes their results vary.
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        )
