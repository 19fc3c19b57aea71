"""How queries meet keys: within packed segments (training, scoring) or against a cache."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Attend, Cache

MASKED = -1e30  # finite, so that a row without any visible key gives 0/0-free garbage, not NaN
BLOCK = 128  # queries of packed rows that attend at one time


def packed_attention(
    segment_ids: jax.Array, positions: jax.Array, precision: Precision, longest: int | None = None
) -> Attend:
    """Causal attention inside each packed example.

    Queries attend in blocks, each to the keys that its examples reach, and the backward pass
    computes a block's weights again: memory grows with the row, not with its square, and time with
    the examples' lengths.

    Args:
      segment_ids: int32 [B, T]; 0 marks padding, which nothing attends to.
      positions: int32 [B, T], restarting at 0 with each segment.
      longest: no example has more tokens; T where not given.

    Positions tell how far back an example began; where a block of queries needs few keys, it meets
    the fewest of some static numbers that hold them.
    """
    rows, length = segment_ids.shape
    blocks = -(-length // BLOCK)
    padding = blocks * BLOCK - length
    starts = jnp.arange(blocks) * BLOCK
    windows = _windows(min((longest or length) + BLOCK - 1, length))
    # Only the example of a block's first query can have begun before the block.
    needed = positions[:, ::BLOCK].max(axis=0) + BLOCK
    choices = jnp.searchsorted(jnp.array(windows[:-1], jnp.int32), needed)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        queries = q, segment_ids, positions
        keys = k, v, segment_ids, positions
        if blocks == 1:
            return _attend_block(queries, keys, precision), cache
        queries = jax.tree.map(functools.partial(_pad_places, count=padding), queries)

        def meet(window: int, start: jax.Array) -> jax.Array:
            first_key = jnp.clip(start + BLOCK - window, 0, length - window)
            return _attend_block(
                jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, BLOCK, 1), queries),
                jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first_key, window, 1), keys),
                precision,
            )

        @jax.checkpoint
        def block(place: tuple[jax.Array, jax.Array]) -> jax.Array:
            start, choice = place
            return jax.lax.switch(choice, [functools.partial(meet, w) for w in windows], start)

        context = jax.lax.map(block, (starts, choices))  # [blocks, B, BLOCK, H, K]
        context = jnp.moveaxis(context, 0, 1).reshape(rows, blocks * BLOCK, *q.shape[2:])
        return context[:, :length], cache

    return attend


def _windows(reach: int) -> list[int]:
    """How many keys a block of queries may meet: each number twice the one before, then `reach`."""
    windows = []
    window = 2 * BLOCK
    while window < reach:
        windows.append(window)
        window *= 2
    return [*windows, reach]


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
