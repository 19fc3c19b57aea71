"""Rotary position embeddings (Su et al., 2021) with every scaling used in the LLaMA family."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from humpback_jax.model.config import LlamaConfig


def rope_tables(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each position's rotation angles.

    Args:
      positions: int32 [B, T], position of each token within its own sequence.

    Returns:
      (cos, sin), both float32 [B, T, head_dim / 2].
    """
    frequencies, attention_factor = _frequencies(config, positions)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x[..., i], x[..., i + head_dim/2]).

    Args:
      x: [B, T, heads, head_dim].
      cos, sin: float32 [B, T, head_dim / 2].

    Returns:
      Same shape and dtype as `x`; the products are taken in float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def llama3_stretch(config: LlamaConfig) -> np.ndarray:
    """How many times longer Llama 3.1's scaling makes each wave, float32 [head_dim / 2]."""
    plain = _plain_frequencies(config)
    keep = _llama3_keep(plain, config.rope_parameters)
    return (1 / (keep + (1 - keep) / config.rope_parameters["factor"])).astype(np.float32)


def _plain_frequencies(config: LlamaConfig) -> np.ndarray:
    return np.float32(1.0) / np.float32(config.rope_theta) ** _exponents(config)


def _exponents(config: LlamaConfig) -> np.ndarray:
    return np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)


def _frequencies(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, float]:
    """Angular frequencies, broadcastable to [B, T, head_dim / 2], and the factor on cos and sin."""
    scaling = config.rope_parameters
    plain = _plain_frequencies(config)
    match config.rope_type:
        case "default":
            return jnp.asarray(plain), 1.0
        case "linear":
            return jnp.asarray(plain / np.float32(scaling["factor"])), 1.0
        case "llama3":
            return jnp.asarray(_llama3(plain, scaling)), 1.0
        case "yarn":
            frequencies, factor = _yarn(config, plain, scaling)
            return jnp.asarray(frequencies), factor
        case "dynamic":
            return _dynamic(config, positions, _exponents(config), scaling), 1.0
        case unknown:
            raise AssertionError(f"rope type {unknown!r} passed LlamaConfig's check")


def _llama3(plain: np.ndarray, scaling: dict[str, float]) -> np.ndarray:
    """Llama 3.1: slow waves are stretched by `factor`, fast ones kept, those between blended."""
    keep = _llama3_keep(plain, scaling)
    return (plain * (keep + (1 - keep) / scaling["factor"])).astype(np.float32)


def _llama3_keep(plain: np.ndarray, scaling: dict[str, float]) -> np.ndarray:
    """By wave: 1 for one that is kept, 0 for one that is stretched, between them a blend."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    return np.clip((turns - low) / (high - low), 0.0, 1.0)


def _yarn(
    config: LlamaConfig, plain: np.ndarray, scaling: dict[str, float]
) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al., 2023): blend by the dimension's number of turns; cos and sin scaled."""
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    half = config.head_dim / 2

    def dimension_with_turns(turns: float) -> float:
        ratio = original / (turns * 2 * math.pi)
        return half * math.log(ratio) / math.log(config.rope_theta)

    low = dimension_with_turns(scaling.get("beta_fast") or 32.0)
    high = dimension_with_turns(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = (np.arange(half, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    keep = 1 - np.clip(ramp, 0.0, 1.0)
    frequencies = plain * keep + plain / factor * (1 - keep)
    return frequencies.astype(np.float32), yarn_attention_factor(scaling)


def yarn_attention_factor(scaling: Mapping[str, float]) -> float:
    """By which cosine and sine are multiplied."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


def _dynamic(
    config: LlamaConfig, positions: jax.Array, exponents: np.ndarray, scaling: dict[str, float]
) -> jax.Array:
    """NTK-aware scaling whose base grows with a sequence's length, beyond the trained one."""
    limit = config.max_position_embeddings
    length = jnp.maximum(_sequence_lengths(positions), limit).astype(jnp.float32)
    factor = scaling["factor"]
    stretch = factor * length / limit - (factor - 1)
    base = config.rope_theta * stretch ** (config.head_dim / (config.head_dim - 2))
    return 1.0 / base[..., None] ** exponents


def _sequence_lengths(positions: jax.Array) -> jax.Array:
    """int32 [B, T]: length of the packed sequence that each token belongs to.

    A token's sequence is known by the place where it starts. In decoding, that lies before the
    only column, and the length is what has been reached so far.
    """
    rows = jnp.arange(positions.shape[0])[:, None]
    starts = jnp.maximum(jnp.arange(positions.shape[1]) - positions, 0)
    lengths = jnp.zeros_like(positions).at[rows, starts].max(positions + 1)
    return lengths[rows, starts]
