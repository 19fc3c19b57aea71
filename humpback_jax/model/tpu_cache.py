"""Prefill and decoding as in `model/cache.py`, by the kernels for TPU.

Under a mesh, each device holds some of the slots and key/value heads (`model/shares.py`), and
computes the chunks of its slots.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from humpback_jax.errors import HumpbackError
from humpback_jax.model.blockwise import BLOCK, Partial, Shared, by_group
from humpback_jax.model.cache import LayerCache
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Attend, Cache
from humpback_jax.model.shares import Shares
from humpback_jax.model.tpu_attention import (
    TILE,
    Fresh,
    Interpret,
    Ref,
    from_kernel_arrays,
    kernel_arrays,
    meet_cache,
    transposed,
)


def decode_attention(
    places: jax.Array,
    shared_counts: jax.Array,
    live: jax.Array,
    precision: Precision,
    *,
    mesh: Mesh | None = None,
    interpret: Interpret = False,
) -> Attend:
    """See `cache.decode_attention`; slots that are not live read and write nothing."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        own, shared = cache
        tokens = q.shape[1]
        if tokens > TILE:
            raise HumpbackError(
                f"{tokens} tokens a step and row; the kernel writes {TILE} at most."
            )
        shares = Shares.of(mesh, len(places), k.shape[2])

        def meet(
            q: jax.Array,
            fresh: Fresh,
            own: LayerCache,
            shared: Shared,
            places: jax.Array,
            shared_counts: jax.Array,
            live: jax.Array,
        ) -> tuple[jax.Array, LayerCache]:
            queries = by_group(q, fresh.keys.shape[2], own.keys[0].dtype)
            capacity = sum(values.shape[2] for values in own.values)
            partial, own = meet_cache(
                Partial.empty(queries).meet_shared(queries, shared, shared_counts),
                queries,
                own,
                jnp.arange(len(places), dtype=jnp.int32),
                places,
                jnp.where(live, jnp.minimum(places + tokens, capacity), 0),
                fresh,
                tokens=tokens,
                interpret=interpret,
            )
            return _finish(partial, tokens, precision), own

        rows = shares.by_row
        context, own = shares.run(
            meet,
            (shares.tokens, shares.tokens, shares.cache, shares.by_group, rows, rows, rows),
            (shares.tokens, shares.cache),
        )(q, Fresh(k, v), own, shared, places, shared_counts, live)
        return context, (own, shared)

    return attend


def chunk_attention(
    slots: jax.Array,
    shared_counts: jax.Array,
    starts: jax.Array,
    precision: Precision,
    *,
    mesh: Mesh | None = None,
    interpret: Interpret = False,
) -> Attend:
    """See `cache.chunk_attention`; chunks are as wide as a block of the cache, 128 tokens."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        own, shared = cache
        tokens, groups = k.shape[1:3]
        if tokens != BLOCK:
            raise HumpbackError(f"chunks of {tokens} tokens; the kernels for TPU need {BLOCK}.")
        shares = Shares.of(mesh, own.keys[0].shape[0], groups)

        def meet(
            q: jax.Array,
            fresh: Fresh,
            own: LayerCache,
            shared: Shared,
            slots: jax.Array,
            shared_counts: jax.Array,
            starts: jax.Array,
        ) -> tuple[jax.Array, LayerCache]:
            queries = by_group(q, fresh.keys.shape[2], own.keys[0].dtype)
            held = own.keys[0].shape[0]
            mine = jnp.zeros_like(slots)
            if shares.rows:
                mine = mine + jax.lax.axis_index(shares.rows) * held
            here = (mine <= slots) & (slots < mine + held)
            local = jnp.where(here, slots - mine, 0)
            own = _write_chunks(own, fresh, local, jnp.where(here, starts, -1), interpret)
            partial, own = meet_cache(
                Partial.empty(queries).meet_shared(queries, shared, shared_counts),
                queries,
                own,
                local,
                starts,
                jnp.where(here, starts + tokens, 0),
                tokens=tokens,
                interpret=interpret,
            )
            context = _finish(partial, tokens, precision)
            if shares.rows:
                context = jax.lax.psum(
                    jnp.where(here[:, None, None, None], context, 0), shares.rows
                )
            return context, own

        chunk, all_chunks = P(None, None, shares.heads), P()
        context, own = shares.run(
            meet,
            (chunk, chunk, shares.cache, shares.by_group, all_chunks, all_chunks, all_chunks),
            (chunk, shares.cache),
        )(q, Fresh(k, v), own, shared, slots, shared_counts, starts)
        return context, (own, shared)

    return attend


def _finish(partial: Partial, tokens: int, precision: Precision) -> jax.Array:
    # Rows that have met nothing are nobody's, but must be numbers.
    total = jnp.where(partial.total == 0, 1, partial.total)
    return partial._replace(total=total).finish(tokens).astype(precision.activations)


def _write_chunks(
    cache: LayerCache, fresh: Fresh, slots: jax.Array, starts: jax.Array, interpret: Interpret
) -> LayerCache:
    """Writes chunks [R, BLOCK, G, K] to each one's slot and start, from memory to memory.

    Chunks that start at -1 are not written.
    """
    dtype, width = cache.keys[0].dtype, cache.keys[0].shape[2]
    ends = tuple(itertools.accumulate(values.shape[2] for values in cache.values))
    new = LayerCache(
        (fresh.keys.transpose(0, 2, 3, 1).astype(dtype),),
        (fresh.values.transpose(0, 2, 1, 3).astype(dtype),),
        (None,),
        (None,),
    )
    stored = kernel_arrays(cache)
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    written = pl.pallas_call(
        functools.partial(_write_kernel, ends, transposed(width)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in stored],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[in_hbm] * (2 + len(stored)),
            out_specs=[in_hbm] * len(stored),
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        input_output_aliases={4 + index: index for index in range(len(stored))},
        interpret=interpret,
        name="write_chunks",
    )(slots, starts, *kernel_arrays(new), *stored)
    return from_kernel_arrays(written, width)


def _write_kernel(
    ends: tuple[int, ...], values_transposed: bool, slots: Ref, starts: Ref, *refs: Ref
) -> None:
    pieces = len(ends)
    keys, values, done = *refs[:2], refs[-1]
    refs = refs[2 + 2 * pieces : -1]
    sides = (keys, refs[:pieces], True), (values, refs[pieces:], values_transposed)

    def each(action: str, row: jax.Array, _: None) -> None:
        slot, start = slots[row], starts[row]
        for new, cache, places_last in sides:
            for (begin, end), piece in zip(itertools.pairwise((0, *ends)), cache, strict=True):
                places = pl.ds(pl.multiple_of(start - begin, BLOCK), BLOCK)
                at = piece.at[slot, :, :, places] if places_last else piece.at[slot, :, places]
                copy = pltpu.make_async_copy(new.at[row], at, done)
                pl.when((begin <= start) & (start < end))(getattr(copy, action))

    for action in ("start", "wait"):
        jax.lax.fori_loop(0, keys.shape[0], functools.partial(each, action), None)
