"""How queries meet keys: within packed segments (training, scoring) or against a cache."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Attend, Cache
from humpback_jax.model.remat import named

MASKED = -1e30  # finite, so that a row without any visible key gives 0/0-free garbage, not NaN
BLOCK = 128  # queries of packed rows that attend at one time


def packed_attention(
    segment_ids: jax.Array, positions: jax.Array, precision: Precision, longest: int | None = None
) -> Attend:
    """Causal attention inside each packed example.

    Queries attend in blocks, each to the keys that its examples can reach, and the backward pass
    computes a block's weights again: memory grows with the row, not with its square, and so does
    time where `longest` is given.

    Args:
      segment_ids: int32 [B, T]; 0 marks padding, which nothing attends to.
      positions: int32 [B, T], restarting at 0 with each segment.
      longest: no example has more tokens; T where not given.
    """
    rows, length = segment_ids.shape
    blocks = -(-length // BLOCK)
    reach = min((longest or length) + BLOCK - 1, length)
    padding = blocks * BLOCK - length

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        queries = q, segment_ids, positions
        keys = k, v, segment_ids, positions
        if blocks == 1:
            return named(_attend_block(queries, keys, precision), "context"), cache
        queries = jax.tree.map(functools.partial(_pad_places, count=padding), queries)

        @jax.checkpoint
        def block(start: jax.Array) -> jax.Array:
            first_key = jnp.clip(start + BLOCK - reach, 0, length - reach)
            return _attend_block(
                jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, BLOCK, 1), queries),
                jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first_key, reach, 1), keys),
                precision,
            )

        context = jax.lax.map(block, jnp.arange(blocks) * BLOCK)  # [blocks, B, BLOCK, H, K]
        context = jnp.moveaxis(context, 0, 1).reshape(rows, blocks * BLOCK, *q.shape[2:])
        return named(context[:, :length], "context"), cache

    return attend


def _pad_places(x: jax.Array, count: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2))


def _attend_block(
    queries: tuple[jax.Array, ...], keys: tuple[jax.Array, ...], precision: Precision
) -> jax.Array:
    q, q_segments, q_positions = queries
    k, v, k_segments, k_positions = keys
    same = q_segments[:, :, None] == k_segments[:, None, :]
    causal = q_positions[:, :, None] >= k_positions[:, None, :]
    visible = same & causal & (k_segments > 0)[:, None, :]
    return grouped_attention(q, k, v, visible, precision)


def grouped_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, precision: Precision
) -> jax.Array:
    """Softmax attention with H query heads over G key/value heads.

    Args:
      q: [B, T, H, K]; k, v: [B, S, G, K]; visible: bool [B, T, S].

    Returns:
      [B, T, H, K] in `precision.activations`; scores and softmax are float32.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    shared = heads // groups
    # One product per row and group over all places of its query heads: many small products, which
    # an einsum over the axes as they come turns into, run at half of the speed on CPU.
    by_group = q.reshape(batch, length, groups, shared, width).transpose(0, 2, 3, 1, 4)
    by_group = by_group.reshape(batch, groups, shared * length, width).astype(precision.compute)
    k, v = (x.transpose(0, 2, 1, 3).astype(precision.compute) for x in (k, v))
    scores = jnp.einsum("bgtk,bgsk->bgts", by_group, k, preferred_element_type="float32")
    scores = scores.reshape(batch, groups, shared, length, -1)
    scores = jnp.where(visible[:, None, None], scores * width**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(precision.compute)
    weights = weights.reshape(batch, groups, shared * length, -1)
    context = jnp.einsum("bgts,bgsk->bgtk", weights, v, preferred_element_type="float32")
    context = context.reshape(batch, groups, shared, length, width).transpose(0, 3, 1, 2, 4)
    return context.reshape(batch, length, heads, width).astype(precision.activations)
