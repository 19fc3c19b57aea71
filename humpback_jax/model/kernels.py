"""Which implementation of attention a program uses: chosen once, here and nowhere else."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from humpback_jax.model import attention, cache
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Attend
from humpback_jax.model.shares import Shares

Kind = Literal["xla", "pallas", "cudnn"]
KINDS: dict[str, Kind] = {"tpu": "pallas", "gpu": "cudnn"}  # by platform; XLA for all others


@dataclasses.dataclass(frozen=True)
class Kernels:
    """How a program attends.

    Attributes:
      kind: "xla" everywhere; "pallas" is for TPU, "cudnn" for NVIDIA GPUs, where it trains and XLA
        decodes.
      mesh: the devices of the program, which share the work of kernels (`model/shares.py`).
      interpret: kernels for TPU compute on any platform what the TPU would, slowly.
    """

    kind: Kind = "xla"
    mesh: Mesh | None = None
    interpret: bool = False

    @classmethod
    def of_platform(cls, platform: str, mesh: Mesh | None = None) -> Kernels:
        """Of the platform that will run the program, which need not be the one at hand."""
        return cls(KINDS.get(platform, "xla"), mesh)

    def packed(
        self,
        segment_ids: jax.Array,
        positions: jax.Array,
        precision: Precision,
        longest: int | None = None,
    ) -> Attend:
        """See `attention.packed_attention`."""
        if self.kind == "pallas":
            from humpback_jax.model.splash import splash_attention

            return splash_attention(
                segment_ids, precision, longest, mesh=self.mesh, interpret=self.interpret
            )
        xla = attention.packed_attention(segment_ids, positions, precision, longest)
        if self.kind == "cudnn":
            from humpback_jax.model.cudnn import cudnn_attention

            return cudnn_attention(segment_ids, precision, xla, mesh=self.mesh)
        return xla

    def cuts_the_cache(self, precision: Precision) -> bool:
        """Whether each device along fsdp keeps some of the rows, too; int8 caches are XLA's."""
        return self.kind == "pallas" and precision.kv is None

    def cache_partition(self, rows: int, groups: int, precision: Precision) -> P:
        """Where caches [rows, groups, ...] lie on the mesh."""
        shares = Shares.of(self.mesh, rows, groups)
        return shares.cache if self.cuts_the_cache(precision) else P(None, shares.heads)

    def prefill(
        self, slots: jax.Array, shared_counts: jax.Array, starts: jax.Array, precision: Precision
    ) -> Attend:
        """See `cache.chunk_attention`."""
        if self.cuts_the_cache(precision):
            from humpback_jax.model import tpu_cache

            return tpu_cache.chunk_attention(
                slots, shared_counts, starts, precision, mesh=self.mesh, interpret=self.interpret
            )
        return cache.chunk_attention(slots, shared_counts, starts, precision)

    def decode(
        self, places: jax.Array, shared_counts: jax.Array, live: jax.Array, precision: Precision
    ) -> Attend:
        """See `cache.decode_attention`."""
        if self.cuts_the_cache(precision):
            from humpback_jax.model import tpu_cache

            return tpu_cache.decode_attention(
                places, shared_counts, live, precision, mesh=self.mesh, interpret=self.interpret
            )
        return cache.decode_attention(places, shared_counts, live, precision)


XLA = Kernels()
