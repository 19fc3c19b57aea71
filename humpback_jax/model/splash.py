"""Attention over packed rows by JAX's splash attention, a Pallas kernel for TPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh

from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Attend, Cache
from humpback_jax.model.shares import Shares

LANES = 128  # blocks are multiples of it
LARGEST_BLOCK = 512


def splash_attention(
    segment_ids: jax.Array,
    precision: Precision,
    longest: int | None = None,
    *,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Attend:
    """`attention.packed_attention`, with gradients; blocks beyond an example's reach are skipped.

    The order of tokens in the row stands for their positions. Under a mesh, each device computes
    its own rows and heads.

    Args:
      segment_ids: int32 [B, T], each example's places in one run; 0 marks padding.
      longest: no example has more tokens.
      interpret: computes on any platform what the TPU would.
    """
    length = segment_ids.shape[1]
    padding = -length % LANES

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        heads, groups = q.shape[2], k.shape[2]
        kernel = functools.partial(
            _each_group, shared=heads // groups, longest=longest, interpret=interpret
        )
        shares = Shares.of(mesh, len(q), groups)
        q = q.astype(jnp.float32) * q.shape[-1] ** -0.5
        q, k, v = (
            jnp.pad(x.astype(precision.compute), ((0, 0), (0, padding), (0, 0), (0, 0)))
            for x in (q, k, v)
        )
        tokens = shares.tokens
        attend = shares.run(kernel, (tokens, tokens, tokens, shares.by_row), tokens)
        context = attend(q, k, v, jnp.pad(segment_ids, ((0, 0), (0, padding))))
        return context[:, :length].astype(precision.activations), cache

    return attend


def _each_group(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    shared: int,
    longest: int | None,
    interpret: bool,
) -> jax.Array:
    """q [B, T, H, K] meets k, v [B, T, G, K]: `shared` query heads the same keys."""
    rows, length, heads, width = q.shape
    kernel = _kernel(length, shared, longest, interpret)
    q = q.reshape(rows, length, -1, shared, width).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    by_group = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    context = jax.vmap(by_group)(q, k, v, splash.SegmentIds(segment_ids, segment_ids))
    return context.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, width)


def _kernel(
    length: int, shared: int, longest: int | None, interpret: bool
) -> Callable[..., jax.Array]:
    """For queries [shared, T, K] and keys and values [T, K]."""
    block = next(size for size in (LARGEST_BLOCK, 256, LANES) if length % size == 0)
    reach = min(longest or length, length)
    mask = splash.LocalMask((length, length), (reach - 1, 0), 0)
    return splash.make_splash_mqa(
        splash.MultiHeadMask([mask] * shared),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name="context",  # of `remat.NAMES`: what its backward pass needs
    )
