"""How queries meet keys: within packed segments (training, scoring) or against a cache."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

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

    Queries attend in blocks, each to the keys that its examples reach, and the backward pass
    computes a block's weights again (Dao, 2022): memory grows with the row, not with its square,
    and time with the examples' lengths.

    Args:
      segment_ids: int32 [B, T]; 0 marks padding, which nothing attends to.
      positions: int32 [B, T], restarting at 0 with each segment. They tell how far back an example
        began; a block meets the fewest keys, of some static numbers, that hold all it needs.
      longest: no example has more tokens; T where not given.
    """
    length = segment_ids.shape[1]
    block = min(BLOCK, length)
    padding = ((0, 0), (0, -length % block))
    segment_ids, positions = jnp.pad(segment_ids, padding), jnp.pad(positions, padding)
    windows = _windows(block, min((longest or length) + block - 1, segment_ids.shape[1]))
    # Only the example of a block's first query can have begun before the block.
    needed = positions[:, ::block].max(axis=0) + block
    choices = jnp.searchsorted(jnp.array(windows[:-1], jnp.int32), needed)
    examples = Examples(segment_ids, positions, choices)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        scaled = q.astype(jnp.float32) * q.shape[-1] ** -0.5
        q, k, v = (
            jnp.pad(x.astype(precision.compute), (*padding, (0, 0), (0, 0))) for x in (scaled, k, v)
        )
        context = _attend(q, k, v, examples, block, windows)
        return context[:, :length].astype(precision.activations), cache

    return attend


def _windows(block: int, reach: int) -> tuple[int, ...]:
    """How many keys a block of queries may meet: growing by half or less, up to `reach`."""
    windows = [block]
    while windows[-1] < reach:
        windows.append(windows[-1] + max(windows[-1] // 2 // block, 1) * block)
    return (*windows[:-1], reach)


class Examples(NamedTuple):
    """What tells packed examples apart: [B, T] as in `packed_attention`, T a multiple of blocks.

    choices: int32 [blocks], the window of each block of queries.
    """

    segment_ids: jax.Array
    positions: jax.Array
    choices: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    examples: Examples,
    block: int,
    windows: tuple[int, ...],
) -> jax.Array:
    """float32 [B, T, H, K] of q [B, T, H, K], scaled, and k, v [B, T, G, K]."""
    return _attend_forward(q, k, v, examples, block, windows)[0]


def _attend_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    examples: Examples,
    block: int,
    windows: tuple[int, ...],
) -> tuple[jax.Array, tuple[Any, ...]]:
    groups = k.shape[2]
    queries = _by_block(q, groups, block)
    keys, values = (x.transpose(0, 2, 1, 3) for x in (k, v))

    def meet(window: int, number: jax.Array, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
        near = Window.of(number, block, window)
        scores = _product("bgqk,bgsk->bgqs", queries, near.cut(keys))
        visible = near.visible(examples)[:, None, None]  # [B, 1, 1, block, window]
        scores = _masked(scores, visible)
        highest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        context = _product("bgqs,bgsk->bgqk", weights.astype(v.dtype), near.cut(values)) / total
        return context, (highest + jnp.log(total))[..., 0]

    def step(number: jax.Array, block_of: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        choice, queries = block_of
        branches = [functools.partial(meet, window) for window in windows]
        return number + 1, jax.lax.switch(choice, branches, number, queries)

    _, found = jax.lax.scan(step, jnp.int32(0), (examples.choices, queries))
    context, log_z = (named(x, "context") for x in found)
    return _by_place(context, q.shape), (queries, keys, values, context, log_z, examples)


def _attend_backward(
    block: int, windows: tuple[int, ...], residuals: tuple[Any, ...], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    queries, keys, values, context, log_z, examples = residuals
    dtype = keys.dtype
    incoming = _by_block(gradient, keys.shape[1], block)
    delta = _product("nbgqk,nbgqk->nbgq", incoming, context)  # a sum takes ten times as long on CPU
    incoming = incoming.astype(dtype)

    def meet(
        window: int, number: jax.Array, sums: tuple[jax.Array, jax.Array], block_of: Any
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        queries, incoming, log_z, delta = block_of
        near = Window.of(number, block, window)
        # Scores lie the other way round than in the forward pass: three of five products then
        # take both sides as they lie.
        scores = _product("bgsk,bgqk->bgsq", near.cut(keys), queries)
        visible = near.visible(examples).mT[:, None, :, None]  # [B, 1, window, 1, block]
        weights = jnp.exp(_masked(scores, visible, -1) - log_z[:, :, None])
        dweights = _product("bgsk,bgqk->bgsq", near.cut(values), incoming)
        dscores = (weights * (dweights - delta[:, :, None])).astype(dtype)
        dkeys, dvalues = sums
        dvalues = near.add(dvalues, _product("bgsq,bgqk->bgsk", weights.astype(dtype), incoming))
        dkeys = near.add(dkeys, _product("bgsq,bgqk->bgsk", dscores, queries))
        return (dkeys, dvalues), _product("bgsq,bgsk->bgqk", dscores, near.cut(keys))

    def step(carry: Any, block_of: Any) -> tuple[Any, jax.Array]:
        number, sums = carry
        choice, *rest = block_of
        branches = [functools.partial(meet, window) for window in windows]
        sums, dqueries = jax.lax.switch(choice, branches, number, sums, rest)
        return (number + 1, sums), dqueries

    zeros = jnp.zeros(keys.shape, jnp.float32)
    (_, sums), dqueries = jax.lax.scan(
        step,
        (jnp.int32(0), (zeros, zeros)),
        (examples.choices, queries, incoming, log_z, delta),
    )
    dkeys, dvalues = (x.transpose(0, 2, 1, 3).astype(dtype) for x in sums)
    return _by_place(dqueries, gradient.shape).astype(dtype), dkeys, dvalues, None


_attend.defvjp(_attend_forward, _attend_backward)


class Window(NamedTuple):
    """The keys that one block of queries meets: `size` of them, from `first` on."""

    start: jax.Array
    first: jax.Array
    block: int
    size: int

    @classmethod
    def of(cls, number: jax.Array, block: int, size: int) -> Window:
        start = number * block
        return cls(start, jnp.maximum(start + block - size, 0), block, size)

    def cut(self, x: jax.Array, axis: int = 2) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, self.first, self.size, axis)

    def add(self, x: jax.Array, update: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, self.cut(x) + update, self.first, 2)

    def visible(self, examples: Examples) -> jax.Array:
        """bool [B, block, size]."""
        segments, positions = examples.segment_ids, examples.positions
        mine, places = (
            jax.lax.dynamic_slice_in_dim(x, self.start, self.block, 1)[:, :, None]
            for x in (segments, positions)
        )
        theirs, others = (self.cut(x, 1)[:, None] for x in (segments, positions))
        return (mine == theirs) & (places >= others) & (theirs > 0)


def _masked(scores: jax.Array, visible: jax.Array, axis: int = -2) -> jax.Array:
    """Scores [B, G, ..] whose axis of queries holds H/G heads of each of a block's places."""
    axis = scores.ndim + axis
    shape = scores.shape
    split = (*shape[:axis], -1, visible.shape[axis + 1], *shape[axis + 1 :])
    return jnp.where(visible, scores.reshape(split), MASKED).reshape(shape)


def _by_block(x: jax.Array, groups: int, block: int) -> jax.Array:
    """[B, T, H, K] -> [blocks, B, G, H/G * block, K]: one matrix for each key/value head."""
    rows, length, heads, width = x.shape
    x = x.reshape(rows, length // block, block, groups, heads // groups, width)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(-1, rows, groups, heads // groups * block, width)


def _by_place(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The reverse of `_by_block`."""
    rows, length, heads, width = shape
    blocks, _, groups = x.shape[:3]
    x = x.reshape(blocks, rows, groups, heads // groups, length // blocks, width)
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(shape)


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type="float32")


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
