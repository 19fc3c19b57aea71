"""The key/value cache of decoding: arrays at KV-head size, a few for each layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from humpback_jax.model.blockwise import BLOCK, GROUP, Partial, by_group
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Attend, Cache
from humpback_jax.model.quantize import quantize


class LayerCache(NamedTuple):
    """Keys (already rotated) and values of one layer, for B slots of S places.

    The places are cut into pieces, of S_0, S_1, ... places, each an array of its own: pieces that
    no row has reached are skipped, and skipping needs no copy.

    keys: each [B, G, K, S_i], so that scores are plain matrix products.
    values: each [B, G, S_i, K].
    key_scales, value_scales: each float32 [B, G, S_i] where keys and values are int8, else None.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    key_scales: tuple[jax.Array | None, ...]
    value_scales: tuple[jax.Array | None, ...]


# One piece of each field of `LayerCache`.
Piece = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]


def capacity_for(places: int) -> int:
    """The number of places of slots that hold so many: a power of two."""
    return max(BLOCK, 1 << (places - 1).bit_length())


def _piece_sizes(capacity: int) -> list[int]:
    """128, 128, 256, 512, ...: each piece doubles what the ones before it hold."""
    sizes = [BLOCK]
    while sum(sizes) < capacity:
        sizes.append(sum(sizes))
    return sizes


def empty_cache(config: LlamaConfig, rows: int, capacity: int, dtype: str) -> list[LayerCache]:
    """A cache without content for each layer; `capacity` is a result of `capacity_for`."""
    sizes = _piece_sizes(capacity)
    groups, width = config.num_key_value_heads, config.head_dim

    def scales() -> tuple[jax.Array | None, ...]:
        return tuple(jnp.zeros((rows, groups, size)) if dtype == "int8" else None for size in sizes)

    caches = []
    for _ in range(config.num_hidden_layers):
        keys = tuple(jnp.zeros((rows, groups, width, size), dtype) for size in sizes)
        values = tuple(jnp.zeros((rows, groups, size, width), dtype) for size in sizes)
        caches.append(LayerCache(keys, values, scales(), scales()))
    return caches


def cache_bytes(config: LlamaConfig, rows: int, capacity: int, dtype: str) -> int:
    """Size of the whole cache: 2 * layers * rows * G * S vectors of K elements, and a scale."""
    vectors = 2 * config.num_hidden_layers * rows * config.num_key_value_heads * capacity
    scale = 4 if dtype == "int8" else 0
    return vectors * (config.head_dim * jnp.dtype(dtype).itemsize + scale)


def chunk_attention(
    slots: jax.Array, shared_counts: jax.Array, starts: jax.Array, precision: Precision
) -> Attend:
    """Prefill: chunks of prompts, each written into its slot's cache, attend up to themselves.

    Several chunks of one prompt may stand in one call: all keys are written before any is read.
    Each layer's cache is a pair (LayerCache, Shared).

    Args:
      slots: int32 [R], the slot of each chunk.
      shared_counts: int32 [R], how many of the shared keys stand before the prompt's own.
      starts: int32 [R], the place in the slot where the chunk begins, a multiple of its width,
        which divides `BLOCK`.
    """

    together = math.gcd(GROUP, len(slots))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        own, shared = cache
        own = _write_chunks(own, k, v, slots, starts)
        width, groups, dtype = q.shape[1], k.shape[2], jnp.dtype(precision.compute)

        def group(chunk: tuple[jax.Array, ...]) -> jax.Array:
            q, slots, counts, starts = chunk
            # Fused with the slices below, XLA's CPU backend may give two of them one name.
            slots = jax.lax.optimization_barrier(slots)
            queries = by_group(q, groups, dtype)
            partial = Partial.empty(queries).meet_shared(queries, shared, counts)
            place, begin = starts[:, None] + jnp.arange(width), 0
            for piece in zip(*own, strict=True):
                meet = functools.partial(_meet_block, queries, slots, piece, place, begin)
                blocks = (starts.max() + width - begin + BLOCK - 1) // BLOCK
                size = piece[1].shape[2]
                partial = jax.lax.fori_loop(0, jnp.clip(blocks, 0, size // BLOCK), meet, partial)
                begin += size
            return partial.finish(width)

        grouped = (x.reshape(-1, together, *x.shape[1:]) for x in (q, slots, shared_counts, starts))
        context = jax.lax.map(group, tuple(grouped))
        return context.reshape(q.shape).astype(precision.activations), (own, shared)

    return attend


def _meet_block(
    queries: jax.Array,
    slots: jax.Array,
    piece: Piece,
    place: jax.Array,
    begin: int,
    block: jax.Array,
    partial: Partial,
) -> Partial:
    """Queries at `place` [B, T] meet a block of their slots' keys, in the piece from `begin` on."""

    def cut(array: jax.Array, axis: int) -> jax.Array:
        shape = (1, *array.shape[1:axis], BLOCK, *array.shape[axis + 1 :])
        rows = []
        for index in range(len(slots)):
            at: list[jax.Array | int] = [slots[index], *[0] * (array.ndim - 1)]
            at[axis] = block * BLOCK
            rows.append(jax.lax.dynamic_slice(array, at, shape, allow_negative_indices=False))
        return jnp.concatenate(rows)

    keys, values, *scales = piece
    visible = begin + block * BLOCK + jnp.arange(BLOCK) <= place[:, :, None]
    cut_scales = (None if scale is None else cut(scale, 2) for scale in scales)
    return partial.meet(queries, cut(keys, 3), cut(values, 2), visible, *cut_scales)


def decode_attention(
    places: jax.Array, shared_counts: jax.Array, live: jax.Array, precision: Precision
) -> Attend:
    """Decoding: the next tokens [B, T] of every slot, T = 1, or more where drafts are checked.

    Each layer's cache is a pair (LayerCache, Shared).

    Args:
      places: int32 [B], the place of each slot's first new token. Tokens at places that the cache
        does not have are not written.
      shared_counts: int32 [B], as in `chunk_attention`.
      live: bool [B]; other slots are computed too, but make nobody read further than need be.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        own, shared = cache
        width = q.shape[1]
        own = _write_tokens(own, k, v, places)
        queries = by_group(q, k.shape[2], k.dtype)
        place = places[:, None] + jnp.arange(width)
        reached = jnp.where(live, places, 0).max() + width
        partial = Partial.empty(queries).meet_shared(queries, shared, shared_counts)
        begin = 0
        for piece in zip(*own, strict=True):
            size = piece[1].shape[2]
            visible = begin + jnp.arange(size) <= place[:, :, None]
            meet = functools.partial(_meet_piece, queries, piece, visible)
            if begin == 0:
                partial = meet(partial)
            else:
                partial = jax.lax.cond(reached > begin, meet, lambda partial: partial, partial)
            begin += size
        return partial.finish(width).astype(precision.activations), (own, shared)

    return attend


def _meet_piece(queries: jax.Array, piece: Piece, visible: jax.Array, partial: Partial) -> Partial:
    keys, values, *scales = piece
    return partial.meet(queries, keys, values, visible, *scales)


def _write_chunks(
    cache: LayerCache, k: jax.Array, v: jax.Array, slots: jax.Array, starts: jax.Array
) -> LayerCache:
    """Writes k, v [R, C, G, K] at each chunk's slot and start."""
    rows = cache.keys[0].shape[0]

    def where(begin: int, size: int) -> tuple[jax.Array, jax.Array]:
        inside = (starts >= begin) & (starts < begin + size)
        # A chunk of another piece is sent to a slot that does not exist, which drops it.
        slot = jnp.where(inside, slots, rows)[:, None]
        return slot, (starts - begin)[:, None] + jnp.arange(k.shape[1])

    return _write(cache, k, v, where)


def _write_tokens(cache: LayerCache, k: jax.Array, v: jax.Array, places: jax.Array) -> LayerCache:
    """Writes k, v [B, T, G, K] at each slot's places from `places` [B] on."""
    slot = jnp.arange(k.shape[0])[:, None]

    def where(begin: int, size: int) -> tuple[jax.Array, jax.Array]:
        place = (places - begin)[:, None] + jnp.arange(k.shape[1])
        # Negative indices would count from the end.
        return slot, jnp.where(place < 0, size, place)

    return _write(cache, k, v, where)


def _write(
    cache: LayerCache,
    k: jax.Array,
    v: jax.Array,
    where: Callable[[int, int], tuple[jax.Array, jax.Array]],
) -> LayerCache:
    """Writes k, v [R, C, G, K] into each piece, at `where(its begin, its size)`: (slots, places).

    Slots and places, [R, C] when broadcast, that the piece does not have are not written.
    """
    (k, k_scale), (v, v_scale) = (_stored(x, cache.keys[0].dtype) for x in (k, v))
    pieces, begin = [], 0
    for keys, values, key_scales, value_scales in zip(*cache, strict=True):
        size = values.shape[2]
        slot, place = where(begin, size)
        keys = keys.at[slot, :, :, place].set(k, mode="drop")
        values = values.at[slot, :, place].set(v, mode="drop")
        scales = (
            None if old is None else old.at[slot, :, place].set(new, mode="drop")
            for old, new in ((key_scales, k_scale), (value_scales, v_scale))
        )
        pieces.append((keys, values, *scales))
        begin += size
    return LayerCache(*zip(*pieces, strict=True))


def _stored(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """Keys or values [R, C, G, K] as the cache keeps them, and their scales [R, C, G] if int8."""
    return quantize(x, -1) if dtype == jnp.int8 else (x.astype(dtype), None)
