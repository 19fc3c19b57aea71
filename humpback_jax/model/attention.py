"""How queries meet keys: within packed segments (training, scoring) or against a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Attend, Cache

MASKED = -1e30  # finite, so that a row without any visible key gives 0/0-free garbage, not NaN


def packed_attention(segment_ids: jax.Array, positions: jax.Array, precision: Precision) -> Attend:
    """Causal attention inside each packed example.

    Args:
      segment_ids: int32 [B, T]; 0 marks padding, which nothing attends to.
      positions: int32 [B, T], restarting at 0 with each segment.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = positions[:, :, None] >= positions[:, None, :]
    visible = same & causal & (segment_ids > 0)[:, None, :]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return grouped_attention(q, k, v, visible, precision), cache

    return attend


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
    q = q.reshape(batch, length, groups, heads // groups, width).astype(precision.compute)
    scores = jnp.einsum(
        "btgrk,bsgk->bgrts", q, k.astype(precision.compute), preferred_element_type="float32"
    )
    scores = jnp.where(visible[:, None, None], scores * width**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(precision.compute)
    context = jnp.einsum(
        "bgrts,bsgk->btgrk", weights, v.astype(precision.compute), preferred_element_type="float32"
    )
    return context.reshape(batch, length, heads, width).astype(precision.activations)
