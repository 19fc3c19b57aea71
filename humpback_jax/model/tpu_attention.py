"""Attention against the key/value cache as a Pallas kernel for TPU.

A step of the kernel is a span of the places that one row has reached. There are as many steps as
there is work, counted when the program runs: what a row has not reached is neither fetched nor
waited for, and rows that read nothing keep their `Partial` where it lies. New tokens enter the
cache on the way, while the tiles that receive them are at hand: XLA's scatter wants the cache in
another layout, and copies all of it there and back for each token.

The kernels of `jax.experimental.pallas.ops.tpu` read pages of another layout, keep to themselves
the softmax statistics that join the shared prefix, and leave writing to XLA.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from humpback_jax.model.attention import MASKED
from humpback_jax.model.blockwise import BLOCK, Partial
from humpback_jax.model.cache import LayerCache

TILE = 32  # places that values are written by: the most that any dtype packs together
LANES = 128  # numbers in a row of a vector register
STEP_BYTES = 1 << 20  # keys and values that a step fetches: enough to hide what a step costs
STEP_QUERIES = 1024  # queries of a step, over its heads
STEP_SCORES = 1 << 19
STEP_BLOCKS = 4

Ref = Any  # an array that a kernel reads and writes in place
Interpret = bool | pltpu.InterpretParams


class Fresh(NamedTuple):
    """Keys and values [R, T, G, K] of tokens that are not in the cache yet; T is at most 32."""

    keys: jax.Array
    values: jax.Array


def meet_cache(
    partial: Partial,
    queries: jax.Array,
    cache: LayerCache,
    slots: jax.Array,
    places: jax.Array,
    reached: jax.Array,
    fresh: Fresh | None = None,
    *,
    tokens: int,
    interpret: Interpret = False,
) -> tuple[Partial, LayerCache]:
    """What R rows know after their queries have met the keys in their slots, and the cache.

    Args:
      queries: [R, G, Q, K] of T tokens each, by `by_group`, in the cache's dtype.
      slots: int32 [R], the slot that a row reads; with `fresh`, each slot once.
      places: int32 [R], the place of a row's first token. A token sees the places up to its own.
      reached: int32 [R], how many places a row reads; 0: nothing is read, met or written.
      fresh: is written to the cache first, as far as `reached`.
      tokens: T.
      interpret: computes on any platform what the TPU would, as these parameters say.
    """
    rows, groups, count, width = queries.shape
    shape = _Shape.choose(cache, groups, count, tokens)
    spans = (reached + shape.span - 1) // shape.span
    most = rows * -(-shape.ends[-1] // shape.span)
    row_of = jnp.repeat(jnp.arange(rows, dtype=jnp.int32), spans, total_repeat_length=most)
    work = _Work(row_of, jnp.cumsum(spans) - spans, slots, places, reached, spans.sum()[None])

    def of_row(*size: int) -> pl.BlockSpec:
        def index(part: jax.Array, step: jax.Array, row_of: Ref, *_: Ref) -> tuple[Any, ...]:
            return row_of[step], part, 0, 0

        return pl.BlockSpec((None, shape.heads, *size), index)

    known = [partial.highest[..., None], partial.total[..., None], partial.context]
    known_specs = [of_row(count, 1), of_row(count, 1), of_row(count, width)]
    new = [] if fresh is None else [_by_head(x, queries.dtype) for x in fresh]
    stored = kernel_arrays(cache)
    stored_specs = [pl.BlockSpec(memory_space=pltpu.HBM)] * len(stored)
    before = len(work) + 1 + len(new)
    highest, total, context, *stored = pl.pallas_call(
        functools.partial(_kernel, shape, fresh is not None),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*known, *stored)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(work),
            grid=(groups // shape.heads, work.steps[0]),
            in_specs=[
                of_row(count, width),
                *[of_row(TILE, width)] * len(new),
                *known_specs,
                *stored_specs,
            ],
            out_specs=[*known_specs, *stored_specs],
            scratch_shapes=[
                pltpu.VMEM((2, shape.heads, width, shape.span), queries.dtype),
                pltpu.VMEM((2, shape.heads, *shape.values_of(shape.span, width)), queries.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        input_output_aliases={before + i: i for i in range(len(known) + len(stored))},
        interpret=interpret,
        name="meet_cache",
    )(*work, queries, *new, *known, *stored)
    partial = Partial(highest[..., 0], total[..., 0], context)
    return partial, from_kernel_arrays(stored, width)


def transposed(width: int) -> bool:
    """Whether kernels take values as they take keys, [B, G, K, S].

    Rows of fewer than 128 numbers would be padded, for which XLA copies the values there and back.
    As it prefers to keep them, places are the last axis, and transposing them costs nothing.
    """
    return width % LANES != 0


def kernel_arrays(cache: LayerCache) -> list[jax.Array]:
    """The keys and values of all pieces, as kernels take them."""
    values = cache.values
    if transposed(cache.keys[0].shape[2]):
        values = tuple(x.swapaxes(2, 3) for x in values)
    return [*cache.keys, *values]


def from_kernel_arrays(arrays: Sequence[jax.Array], width: int) -> LayerCache:
    """The inverse of `kernel_arrays`."""
    keys, values = arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]
    if transposed(width):
        values = [x.swapaxes(2, 3) for x in values]
    no_scales = (None,) * len(keys)
    return LayerCache(tuple(keys), tuple(values), no_scales, no_scales)


def _by_head(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[R, T, G, K] -> [R, G, TILE, K]."""
    x = x.transpose(0, 2, 1, 3).astype(dtype)
    return jnp.pad(x, ((0, 0), (0, 0), (0, TILE - x.shape[2]), (0, 0)))


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static sizes: T tokens; key/value heads and blocks of a step; where the pieces end.

    transposed: see the function of this name.
    """

    tokens: int
    heads: int
    blocks: int
    ends: tuple[int, ...]
    transposed: bool

    @property
    def span(self) -> int:
        return self.blocks * BLOCK

    def values_of(self, places: int, width: int) -> tuple[int, int]:
        return (width, places) if self.transposed else (places, width)

    @classmethod
    def choose(cls, cache: LayerCache, groups: int, queries: int, tokens: int) -> _Shape:
        width, itemsize = cache.keys[0].shape[2], cache.keys[0].dtype.itemsize
        ends = tuple(itertools.accumulate(values.shape[2] for values in cache.values))
        divisors = [heads for heads in range(1, groups + 1) if groups % heads == 0]
        heads = max(n for n in divisors if n == 1 or n * queries <= STEP_QUERIES)
        blocks = min(
            STEP_BYTES // (2 * heads * width * BLOCK * itemsize),
            STEP_SCORES // (heads * queries * BLOCK),
            STEP_BLOCKS,
            ends[-1] // BLOCK,
        )
        return cls(tokens, heads, max(blocks, 1), ends, transposed(width))


class _Work(NamedTuple):
    """The row of each step, the first step of each row, its bounds; steps: [1]."""

    row_of: Ref
    first: Ref
    slots: Ref
    places: Ref
    reached: Ref
    steps: Ref


class _Side(NamedTuple):
    """Keys or values: the pieces of the cache, and a step's share in two buffers.

    axis: of places. tile: places that are written at one time.
    """

    pieces: tuple[Ref, ...]
    buffers: Ref
    axis: int
    tile: int


class _Turn(NamedTuple):
    """A step: its heads, from `head` on; its row; the place of its first key; its buffer."""

    head: jax.Array
    row: jax.Array
    begin: jax.Array
    buffer: jax.Array

    @classmethod
    def at(cls, shape: _Shape, work: _Work, number: jax.Array) -> _Turn:
        part, step = jax.lax.div(number, work.steps[0]), jax.lax.rem(number, work.steps[0])
        row = work.row_of[step]
        begin = (step - work.first[row]) * shape.span
        return cls(part * shape.heads, row, begin, jax.lax.rem(number, 2))


def _kernel(shape: _Shape, writes: bool, *refs: Ref) -> None:
    pieces = len(shape.ends)
    sizes = [len(_Work._fields), 1, 2 * writes, 3, 2 * pieces, 3, pieces, pieces, 4]
    cuts = itertools.accumulate(sizes, initial=0)
    parts = [refs[start:end] for start, end in itertools.pairwise(cuts)]
    scalars, (queries,), fresh, before, _, known, keys, values, scratch = parts
    key_buffers, value_buffers, arrived, stored = scratch
    value_axes = (3, BLOCK) if shape.transposed else (2, TILE)
    sides = _Side(keys, key_buffers, 3, BLOCK), _Side(values, value_buffers, *value_axes)
    work = _Work(*scalars)
    number = pl.program_id(0) * work.steps[0] + pl.program_id(1)
    last = pl.num_programs(0) * work.steps[0] - 1
    turn_at = functools.partial(_Turn.at, shape, work)
    turn = turn_at(number)

    @pl.when(number == 0)
    def _begin() -> None:
        # What is not fetched weighs nothing, and only numbers do.
        value_buffers[...] = jnp.zeros_like(value_buffers)
        _fetch(shape, work, sides, turn, arrived)

    if writes:

        @pl.when(number > 0)
        def _written() -> None:
            _store(shape, work, sides, turn_at(number - 1), stored, "wait")

    @pl.when(number < last)
    def _ahead() -> None:
        _fetch(shape, work, sides, turn_at(number + 1), arrived)

    @pl.when(turn.begin == 0)
    def _enter() -> None:
        for old, current in zip(before, known, strict=True):
            current[...] = old[...]

    _await(shape, work, sides, turn, arrived)
    if writes:
        _insert(shape, work, sides, turn, fresh)
        _store(shape, work, sides, turn, stored, "start")
    _meet(shape, work, sides, turn, queries, known)
    if writes:

        @pl.when(number == last)
        def _end() -> None:
            _store(shape, work, sides, turn, stored, "wait")


def _meet(
    shape: _Shape,
    work: _Work,
    sides: tuple[_Side, _Side],
    turn: _Turn,
    queries: Ref,
    known: tuple[Ref, ...],
) -> None:
    """`Partial.meet` with what is in the buffers."""
    highest, total, context = known
    keys, values = (side.buffers[turn.buffer] for side in sides)
    scores = _product("gqk,gks->gqs", queries[...], keys)
    token = jax.lax.rem(_iota(scores.shape, 1), jnp.int32(shape.tokens))
    visible = turn.begin + _iota(scores.shape, 2) <= work.places[turn.row] + token
    scores = jnp.where(visible, scores * queries.shape[-1] ** -0.5, MASKED)
    new = jnp.maximum(highest[...], scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - new)
    kept = jnp.exp(highest[...] - new)
    highest[...] = new
    total[...] = total[...] * kept + weights.sum(axis=-1, keepdims=True)
    mix = "gqs,gks->gqk" if shape.transposed else "gqs,gsk->gqk"
    mixed = _product(mix, weights.astype(values.dtype), values)
    context[...] = context[...] * kept + mixed


def _fetch(
    shape: _Shape, work: _Work, sides: tuple[_Side, _Side], turn: _Turn, arrived: Ref
) -> None:
    """Starts to read every block of the span that the row has reached."""
    for index, side in itertools.product(range(shape.blocks), sides):
        place = turn.begin + index * BLOCK
        buffer = _in_buffer(side, turn, index * BLOCK, BLOCK)
        for holds, stored in _in_cache(shape, work, side, turn, place, BLOCK):
            copy = pltpu.make_async_copy(stored, buffer, arrived.at[turn.buffer])
            pl.when(holds & (place < work.reached[turn.row]))(copy.start)


def _await(
    shape: _Shape, work: _Work, sides: tuple[_Side, _Side], turn: _Turn, arrived: Ref
) -> None:
    """Waits for what `_fetch` has started, of which only the size matters."""
    for index, side in itertools.product(range(shape.blocks), sides):
        buffer = _in_buffer(side, turn, index * BLOCK, BLOCK)
        copy = pltpu.make_async_copy(buffer, buffer, arrived.at[turn.buffer])
        pl.when(turn.begin + index * BLOCK < work.reached[turn.row])(copy.wait)


def _insert(
    shape: _Shape,
    work: _Work,
    sides: tuple[_Side, _Side],
    turn: _Turn,
    fresh: tuple[Ref, ...],
) -> None:
    """Puts the new tokens of this span into the buffers, by products with zeros and ones."""
    place = work.places[turn.row]
    for side, new in zip(sides, fresh, strict=True):
        for received, begin in _received(shape, work, side, turn):

            @pl.when(received)
            def _(side: _Side = side, new: Ref = new, begin: jax.Array = begin) -> None:
                tile = _in_buffer(side, turn, begin - turn.begin, side.tile)
                chosen = (shape.heads, side.tile, TILE)
                chosen = begin + _iota(chosen, 1) == place + _iota(chosen, 2)
                chosen = chosen.astype(jnp.float32).astype(tile.dtype)
                spread = "gtk,gst->gks" if side.axis == 3 else "gst,gtk->gsk"
                operands = (new[...], chosen) if side.axis == 3 else (chosen, new[...])
                moved = _product(spread, *operands).astype(tile.dtype)
                at = begin - place + _iota(moved.shape, side.axis - 1)
                is_new = (at >= 0) & (at < shape.tokens)
                tile[...] = jnp.where(is_new, moved, tile[...])


def _store(
    shape: _Shape,
    work: _Work,
    sides: tuple[_Side, _Side],
    turn: _Turn,
    stored: Ref,
    action: str,
) -> None:
    """Starts to write the tiles that `_insert` has changed, or waits until they are written."""
    for side in sides:
        for received, begin in _received(shape, work, side, turn):
            buffer = _in_buffer(side, turn, begin - turn.begin, side.tile)
            for holds, cache in _in_cache(shape, work, side, turn, begin, side.tile):
                copy = pltpu.make_async_copy(buffer, cache, stored)
                pl.when(received & holds)(getattr(copy, action))


def _received(
    shape: _Shape, work: _Work, side: _Side, turn: _Turn
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The first place of each tile that new tokens may stand in, and whether this span's do."""
    place = work.places[turn.row]
    end = jnp.minimum(place + shape.tokens, work.reached[turn.row])
    begin = jax.lax.div(place, jnp.int32(side.tile)) * side.tile
    for tile in range(1 if shape.tokens == 1 else 2):
        at = begin + tile * side.tile
        yield (turn.begin <= at) & (at < turn.begin + shape.span) & (at < end), at


def _in_buffer(side: _Side, turn: _Turn, offset: int | jax.Array, count: int) -> Ref:
    return _cut(side, side.buffers, turn.buffer, slice(None), offset, count)


def _in_cache(
    shape: _Shape, work: _Work, side: _Side, turn: _Turn, place: jax.Array, count: int
) -> Iterator[tuple[jax.Array, Ref]]:
    """`count` places from `place` on in each piece, and whether the piece holds them."""
    slot, heads = work.slots[turn.row], pl.ds(turn.head, shape.heads)
    bounds = itertools.pairwise((0, *shape.ends))
    for (begin, end), piece in zip(bounds, side.pieces, strict=True):
        here = _cut(side, piece, slot, heads, place - begin, count)
        yield (begin <= place) & (place < end), here


def _cut(
    side: _Side, ref: Ref, slot: jax.Array, heads: Any, offset: int | jax.Array, count: int
) -> Ref:
    places = pl.ds(pl.multiple_of(jnp.asarray(offset), count), count)
    return ref.at[slot, heads, :, places] if side.axis == 3 else ref.at[slot, heads, places, :]


def _product(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    # The default would round float32 to bfloat16.
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32, precision=exact)


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
