"""Attention over packed rows by cuDNN's fused kernels for NVIDIA GPUs."""

from __future__ import annotations

from typing import Literal

import jax
from jax.sharding import Mesh

from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Attend, Cache
from humpback_jax.model.shares import Shares

WIDEST_HEAD = 128  # on every GPU that has the kernels


def cudnn_takes(width: int, length: int, precision: Precision) -> bool:
    """Whether cuDNN attends with heads of this width over rows of this length.

    It has no float32, and wants its masks to be of an even length.
    """
    shape = width <= WIDEST_HEAD and width % 8 == 0 and length % 2 == 0
    return shape and precision.compute == "bfloat16"


def cudnn_attention(
    segment_ids: jax.Array,
    precision: Precision,
    otherwise: Attend,
    *,
    mesh: Mesh | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Attend:
    """`attention.packed_attention`, with gradients.

    JAX's public interface knows no packed rows: what tells examples apart is a mask, of B * T * T
    elements, while scores are never held. The order of tokens in the row stands for their
    positions. Under a mesh, each device computes its own rows and heads.

    Args:
      segment_ids: int32 [B, T], each example's places in one run; 0 marks padding.
      otherwise: attends where cuDNN does not take the shapes or the precision.
      implementation: "xla" computes the same without a GPU.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        if not cudnn_takes(q.shape[-1], q.shape[1], precision):
            return otherwise(q, k, v, cache)

        def meet(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
            # Padding sees padding, so that no query is left without a key.
            same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
            return jax.nn.dot_product_attention(
                q, k, v, mask=same, is_causal=True, implementation=implementation
            )

        shares = Shares.of(mesh, len(q), k.shape[2])
        tokens = shares.tokens
        run = shares.run(meet, (tokens, tokens, tokens, shares.by_row), tokens)
        context = run(*(x.astype(precision.compute) for x in (q, k, v)), segment_ids)
        return context.astype(precision.activations), cache

    return attend
