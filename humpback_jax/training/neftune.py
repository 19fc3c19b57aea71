"""Noise on the embeddings of the examples (NEFTune: Jain et al., 2023)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def with_noise(x: jax.Array, segment_ids: jax.Array, alpha: float, key: jax.Array) -> jax.Array:
    """x [rows, tokens, D] + uniform(-1, 1) * alpha / sqrt(L * D).

    L is the length of a token's example, however many share its row. Padding gets nothing.

    Args:
      segment_ids: int32 [rows, tokens]; 0 is padding.
    """
    count = segment_ids.shape[-1] + 1  # segments that a row can have, and padding
    length = jax.vmap(lambda row: jnp.bincount(row, length=count)[row])(segment_ids)
    largest = alpha * jax.lax.rsqrt(length.astype(jnp.float32) * x.shape[-1])
    largest = jnp.where(segment_ids > 0, largest, 0.0)
    noise = jax.random.uniform(key, x.shape, jnp.float32, -1.0, 1.0)
    return x + (noise * largest[..., None]).astype(x.dtype)
