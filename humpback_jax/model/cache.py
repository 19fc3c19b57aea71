"""The key/value cache of decoding: one pair of arrays a layer, at KV-head size."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from humpback_jax.model.attention import MASKED, grouped_attention
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Attend, Cache


class LayerCache(NamedTuple):
    """Keys (already rotated) and values of one layer, both [B, G, S, K]."""

    keys: jax.Array
    values: jax.Array


def cache_bytes(config: LlamaConfig, rows: int, length: int, dtype: str) -> int:
    """Size of the whole cache: 2 * layers * rows * G * S * K elements."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * rows * width * length * jnp.dtype(dtype).itemsize


def prefill_attention(lengths: jax.Array, precision: Precision) -> Attend:
    """Causal attention over right-padded prompts; creates the layer's cache, as long as they are.

    Args:
      lengths: int32 [B]; places from there on are padding.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: Cache) -> tuple[jax.Array, Cache]:
        width = q.shape[1]
        place = jnp.arange(width)
        visible = (place[:, None] >= place[None, :])[None] & (place < lengths[:, None])[:, None, :]
        cache = LayerCache(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
        return grouped_attention(q, k, v, visible, precision), cache

    return attend


def decode_attention(positions: jax.Array, precision: Precision) -> Attend:
    """One new token a row, written at its own position [B] and attending to all up to it."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        rows, _, heads, width = q.shape
        groups = k.shape[2]
        index = jnp.arange(rows)
        keys = cache.keys.at[index, :, positions].set(k[:, 0].astype(cache.keys.dtype))
        values = cache.values.at[index, :, positions].set(v[:, 0].astype(cache.values.dtype))
        query = q.reshape(rows, groups, heads // groups, width).astype(keys.dtype)
        scores = jnp.einsum("bgrk,bgsk->bgrs", query, keys, preferred_element_type="float32")
        visible = jnp.arange(keys.shape[2]) <= positions[:, None]
        scores = jnp.where(visible[:, None, None], scores * width**-0.5, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        context = jnp.einsum("bgrs,bgsk->bgrk", weights, values, preferred_element_type="float32")
        context = context.reshape(rows, 1, heads, width).astype(precision.activations)
        return context, LayerCache(keys, values)

    return attend
