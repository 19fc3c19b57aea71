"""Drawing one token per row from logits: greedy, temperature, top-k and top-p without sorting."""

from __future__ import annotations

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from humpback_jax.errors import HumpbackError

Bounds = tuple[jax.Array, jax.Array]
BLOCK = 256  # width of the second level of the cumulative sum


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How text is drawn. Defaults: the paper's nucleus sampling (section 3.1).

    Attributes:
      temperature: 0 means greedy. top_p: 1 switches nucleus sampling off. top_k: 0 means all.
      max_new_tokens: the end-of-turn token counts.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        checks = {
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "max_new_tokens": self.max_new_tokens >= 1,
        }
        for name, fine in checks.items():
            if not fine:
                raise HumpbackError(f"decoding: {name}={getattr(self, name)} is out of range.")


def record_key(seed: int, stage: str, record_id: str, draw: int) -> np.ndarray:
    """uint32 [2]: the random key of one draw for one record, whatever stands beside it.

    The token at position i is drawn with fold_in(key, i).
    """
    text = f"{seed}\x1f{stage}\x1f{record_id}\x1f{draw}".encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), "<u4").astype(np.uint32)


def draw_tokens(
    logits: jax.Array, keys: jax.Array, positions: jax.Array, decoding: Decoding
) -> tuple[jax.Array, jax.Array]:
    """Draws the next token of each row.

    Args:
      logits: float32 [B, V]. keys: uint32 [B, 2], from `record_key`.
      positions: int32 [B], how many tokens the row has drawn so far.

    Returns:
      (token int32 [B], its log-probability float32 [B] under the model itself, that is at
      temperature 1 and without truncation).
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    if decoding.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        weights = truncated_probabilities(logits, decoding)
        uniform = jax.vmap(_uniform)(keys, positions)
        token = _inverse_cdf(weights, uniform)
    return token, jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]


def truncated_probabilities(logits: jax.Array, decoding: Decoding) -> jax.Array:
    """Unnormalised probabilities [B, V] after temperature, then top-k, then top-p (ties kept)."""
    scaled = logits / decoding.temperature
    weights = jnp.exp(scaled - scaled.max(axis=-1, keepdims=True))
    if 0 < decoding.top_k < logits.shape[-1]:
        wanted = jnp.full(logits.shape[:1], float(decoding.top_k))
        weights = _keep_largest(weights, jnp.ones_like(weights), wanted)
    if decoding.top_p < 1:
        wanted = decoding.top_p * weights.sum(axis=-1)
        weights = _keep_largest(weights, weights, wanted)
    return weights


def _keep_largest(weights: jax.Array, measure: jax.Array, wanted: jax.Array) -> jax.Array:
    """Keeps the fewest largest weights whose total measure reaches `wanted` [B].

    Bisection on the bits of the threshold: non-negative floats order like their bit patterns, so 31
    halvings find the exact threshold, at a fraction of the cost of sorting the vocabulary.
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def halve(bounds: Bounds, _: None) -> tuple[Bounds, None]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        reached = jnp.where(bits >= middle[:, None], measure, 0.0).sum(axis=-1) >= wanted
        return (jnp.where(reached, middle, low), jnp.where(reached, high, middle - 1)), None

    low = jnp.zeros(weights.shape[:1], jnp.int32)
    (threshold, _), _ = jax.lax.scan(halve, (low, bits.max(axis=-1)), None, length=31)
    return jnp.where(bits >= threshold[:, None], weights, 0.0)


def _uniform(key: jax.Array, position: jax.Array) -> jax.Array:
    folded = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
    return jax.random.uniform(folded)


def _inverse_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """First index whose cumulative weight exceeds uniform * total; two levels, no long cumsum."""
    rows, vocab = weights.shape
    blocks = -(-vocab // BLOCK)
    padded = jnp.pad(weights, ((0, 0), (0, blocks * BLOCK - vocab))).reshape(rows, blocks, BLOCK)
    sums = padded.sum(axis=-1)
    upto = jnp.cumsum(sums, axis=-1)
    target = uniform * upto[:, -1]
    block = _first_reached(upto, target, sums)[:, None]
    inside = jnp.take_along_axis(padded, block[:, :, None], axis=1)[:, 0]
    before = jnp.take_along_axis(upto - sums, block, axis=1)
    place = _first_reached(before + jnp.cumsum(inside, axis=-1), target, inside)
    return (block[:, 0] * BLOCK + place).astype(jnp.int32)


def _first_reached(upto: jax.Array, target: jax.Array, steps: jax.Array) -> jax.Array:
    """The first place with a step whose sum exceeds `target`, else the last place with a step.

    The condition on the step matters: a parallel sum rounds its terms in another order at each
    place, so that it may rise, or fall, where nothing is added.
    """
    exceeded = (upto > target[:, None]) & (steps > 0)
    last = steps.shape[-1] - 1 - jnp.argmax(steps[:, ::-1] > 0, axis=-1)
    return jnp.where(exceeded.any(axis=-1), jnp.argmax(exceeded, axis=-1), last)
