"""Attention without gradients: keys come in blocks, and only as many as some query can see.

Softmax over blocks keeps the largest score, the sum of weights and the weighted values so far
(Milakov and Gimelshein, 2018). A block of which a query sees nothing changes nothing of that
query's state, to the last bit, so that its result does not depend on what its neighbours need.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from humpback_jax.model.attention import MASKED
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Attend, Cache

BLOCK = 128  # keys of a packed text that meet its queries at one time
CHUNK = 32  # queries of one packed text that meet the same keys
GROUP = 4  # chunks that are computed together


class Shared(NamedTuple):
    """One layer's keys [G, K, P] and values [G, P, K] of a text that rows begin with.

    P is a multiple of `BLOCK`, and rows see the first of them: see `Partial.meet_shared`.
    """

    keys: jax.Array
    values: jax.Array


class Partial(NamedTuple):
    """Attention over the keys met so far: float32, for queries [B, G, Q, K].

    highest, total: [B, G, Q], the largest score and the sum of exp(score - highest).
    context: [B, G, Q, K], values weighted by exp(score - highest).
    """

    highest: jax.Array
    total: jax.Array
    context: jax.Array

    @classmethod
    def empty(cls, queries: jax.Array) -> Partial:
        zeros = jnp.zeros(queries.shape[:-1], jnp.float32)
        return cls(zeros + MASKED, zeros, jnp.zeros(queries.shape, jnp.float32))

    def meet(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        visible: jax.Array,
        key_scales: jax.Array | None = None,
        value_scales: jax.Array | None = None,
    ) -> Partial:
        """With one more block of keys.

        Args:
          queries: [B, G, Q, K], by `by_group`. keys: [B, G, K, S]. values: [B, G, S, K].
          visible: bool [B, T, S]; Q is a multiple of T.
          key_scales, value_scales: [B, G, S], of int8 keys and values. They multiply the scores
            and the weights, which are smaller than keys and values.
        """
        dtype = queries.dtype

        def mix(weights: jax.Array) -> jax.Array:
            if value_scales is not None:
                weights = weights * value_scales[:, :, None]
            return jnp.einsum(
                "bgqs,bgsk->bgqk",
                weights.astype(dtype),
                values.astype(dtype),
                preferred_element_type="float32",
            )

        scores = jnp.einsum(
            "bgqk,bgks->bgqs", queries, keys.astype(dtype), preferred_element_type="float32"
        )
        if key_scales is not None:
            scores = scores * key_scales[:, :, None]
        return self._join(scores, visible, mix)

    def meet_shared(self, queries: jax.Array, shared: Shared, counts: jax.Array) -> Partial:
        """With the keys that all rows share; row b sees the first `counts[b]`."""
        batch, groups, places, width = queries.shape
        rows = queries.transpose(1, 0, 2, 3).reshape(groups, batch * places, width)

        def meet(block: jax.Array, partial: Partial) -> Partial:
            start = block * BLOCK
            keys = jax.lax.dynamic_slice_in_dim(shared.keys, start, BLOCK, 2).astype(rows.dtype)
            values = jax.lax.dynamic_slice_in_dim(shared.values, start, BLOCK, 1).astype(rows.dtype)

            def mix(weights: jax.Array) -> jax.Array:
                flat = weights.astype(rows.dtype).transpose(1, 0, 2, 3)
                flat = flat.reshape(groups, batch * places, BLOCK)
                mixed = jnp.einsum("gqp,gpk->gqk", flat, values, preferred_element_type="float32")
                return mixed.reshape(groups, batch, places, width).transpose(1, 0, 2, 3)

            scores = jnp.einsum("gqk,gkp->gqp", rows, keys, preferred_element_type="float32")
            scores = scores.reshape(groups, batch, places, BLOCK).transpose(1, 0, 2, 3)
            visible = (start + jnp.arange(BLOCK) < counts[:, None])[:, None]
            return partial._join(scores, visible, mix)

        blocks = (counts.max() + BLOCK - 1) // BLOCK
        return jax.lax.fori_loop(0, blocks, meet, self)

    def _join(
        self, scores: jax.Array, visible: jax.Array, mix: Callable[[jax.Array], jax.Array]
    ) -> Partial:
        batch, groups, places, count = scores.shape
        width = self.context.shape[-1]
        by_head = scores.reshape(batch, groups, -1, visible.shape[1], count)
        by_head = jnp.where(visible[:, None, None], by_head * width**-0.5, MASKED)
        scores = by_head.reshape(batch, groups, places, count)
        highest = jnp.maximum(self.highest, scores.max(axis=-1))
        weights = jnp.exp(scores - highest[..., None])
        kept = jnp.exp(self.highest - highest)
        return Partial(
            highest,
            self.total * kept + weights.sum(axis=-1),
            self.context * kept[..., None] + mix(weights),
        )

    def finish(self, places: int) -> jax.Array:
        """The attention's result as [B, T, H, K]: `places` is T."""
        result = self.context / self.total[..., None]
        batch, groups, _, width = result.shape
        result = result.reshape(batch, groups, -1, places, width)
        return result.transpose(0, 3, 1, 2, 4).reshape(batch, places, -1, width)


def by_group(q: jax.Array, groups: int, dtype: jnp.dtype) -> jax.Array:
    """Queries [B, T, H, K] -> [B, G, H/G * T, K]: one matrix for each key/value head."""
    batch, places, heads, width = q.shape
    q = q.reshape(batch, places, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    return q.reshape(batch, groups, -1, width).astype(dtype)


def scoring_attention(
    places: jax.Array,
    branches: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    shared_counts: jax.Array,
    precision: Precision,
) -> Attend:
    """Causal attention inside each of the texts that share one row, after the shared prefix.

    A text begins at a multiple of `CHUNK`, and its keys are met in blocks from its own first token
    on: where it stands in the row, and beside what, changes nothing. Each layer's cache is its
    `Shared` prefix.

    Args:
      places: int32 [T], the order within a text, from 0 (a branch counts on from its trunk).
      branches: int32 [T]: 0 is the text's trunk, which all its branches see; tokens of two
        branches do not see each other.
      starts, lengths, shared_counts: int32 [T / CHUNK], of the text in each chunk: its first
        index, its number of tokens (0: none), and how many shared keys it sees.
    """
    chunks = len(starts)
    together = math.gcd(GROUP, chunks)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        dtype = jnp.dtype(precision.compute)
        groups = k.shape[2]
        # Room behind the last text, so that no block is moved to fit.
        room = ((0, BLOCK),)
        keys = jnp.pad(k[0].transpose(1, 2, 0).astype(dtype), ((0, 0), (0, 0), *room))
        values = jnp.pad(v[0].transpose(1, 0, 2).astype(dtype), ((0, 0), *room, (0, 0)))
        key_places, key_branches = jnp.pad(places, room), jnp.pad(branches, room)
        shared: Shared = cache

        def cut(x: jax.Array, at: jax.Array, axis: int) -> jax.Array:
            parts = [
                jax.lax.dynamic_slice_in_dim(x, at[i], BLOCK, axis)[None] for i in range(together)
            ]
            return jnp.concatenate(parts)

        def group(chunk: tuple[jax.Array, ...]) -> jax.Array:
            index, q, my_places, my_branches, start, length, count = chunk
            queries = by_group(q, groups, dtype)

            def meet(number: jax.Array, partial: Partial) -> Partial:
                at = start + number * BLOCK
                inside = number * BLOCK + jnp.arange(BLOCK) < length[:, None]
                branch = cut(key_branches, at, 0)[:, None, :]
                visible = inside[:, None, :] & (
                    (cut(key_places, at, 0)[:, None, :] <= my_places[:, :, None])
                    & ((branch == 0) | (branch == my_branches[:, :, None]))
                )
                return partial.meet(queries, cut(keys, at, 2), cut(values, at, 1), visible)

            partial = Partial.empty(queries).meet_shared(queries, shared, count)
            # A chunk sees no further than its own end. One without a text meets a block, too: its
            # result must be a number, since its values are met, with weight 0, in the next layer.
            seen = jnp.where(length > 0, (index + 1) * CHUNK - start, 1)
            blocks = (seen.max() + BLOCK - 1) // BLOCK
            return jax.lax.fori_loop(0, blocks, meet, partial).finish(CHUNK)

        context = jax.lax.map(
            group,
            (
                jnp.arange(chunks).reshape(-1, together),
                q[0].reshape(-1, together, CHUNK, *q.shape[2:]),
                places.reshape(-1, together, CHUNK),
                branches.reshape(-1, together, CHUNK),
                *(x.reshape(-1, together) for x in (starts, lengths, shared_counts)),
            ),
        )
        return context.reshape(q.shape).astype(precision.activations), cache

    return attend
