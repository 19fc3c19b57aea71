"""Symmetric int8: whole numbers from -127 to 127, and one scale for all numbers along an axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp

HIGHEST = 127
# Of weights: the axis that shares a scale, by the name of the parameter, in either layout.
QUANTIZED_ALONG = {"kernel": -2, "embedding": -1}


def quantize(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """int8 values like x, and float32 scales [x without `axis`]: x is about values * scale.

    The scale is the largest magnitude / 127, so that no element is off by more than scale / 2.
    """
    wide = x.astype(jnp.float32)
    # At least the smallest normal number: an axis of zeros is not divided by 0.
    smallest = jnp.finfo(jnp.float32).tiny
    scale = jnp.maximum(jnp.abs(wide).max(axis) / HIGHEST, smallest)
    return jnp.round(wide / jnp.expand_dims(scale, axis)).astype(jnp.int8), scale
