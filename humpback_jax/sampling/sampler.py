"""Drawing one token per row from logits: every row its own way, without sorting the vocabulary."""

from __future__ import annotations

import dataclasses
import hashlib
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from humpback_jax.errors import HumpbackError

Bounds = tuple[jax.Array, jax.Array]
BLOCK = 256  # width of the second level of the cumulative sum
STOP_IDS = 16  # ids that may end a row
# Numbers lie on the device as int32 and float32.
_LARGEST = 2**31 - 1
_LEAST, _FINITE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How text is drawn. Defaults: the paper's nucleus sampling (section 3.1).

    Attributes:
      temperature: 0 means greedy. top_p: 1 switches nucleus sampling off. top_k: 0 means all.
      max_new_tokens: the end-of-turn token counts.
      min_p: tokens less likely than this share of the likeliest are not drawn.
      repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that the
        prompt or the text so far contains (Keskar et al., 2019); 1 changes nothing.
      stop_ids, stop_strings: end the text besides the model's own end of turn.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 512
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("top_k", "max_new_tokens"):
            object.__setattr__(self, name, _whole(getattr(self, name)))
        for name in ("stop_ids", "stop_strings"):  # as read from JSON, where one may stand alone
            value = getattr(self, name)
            several = value if isinstance(value, list | tuple) else (value,)
            object.__setattr__(self, name, tuple(map(_whole, several)))
        checks = {
            "temperature": _is_number(self.temperature, 0, _FINITE),
            "top_p": _is_number(self.top_p, _LEAST, 1),
            "top_k": _is_number(self.top_k, 0, _LARGEST, numbers.Integral),
            "max_new_tokens": _is_number(self.max_new_tokens, 1, _LARGEST, numbers.Integral),
            "min_p": _is_number(self.min_p, 0, 1),
            "repetition_penalty": _is_number(self.repetition_penalty, _LEAST, _FINITE),
            "stop_ids": all(_is_number(i, 0, _LARGEST, numbers.Integral) for i in self.stop_ids),
            "stop_strings": all(text and isinstance(text, str) for text in self.stop_strings),
        }
        for name, fine in checks.items():
            if not fine:
                value = getattr(self, name)
                raise HumpbackError(
                    f"decoding: {name}={value!r} is out of range, or of a wrong type."
                )


def _whole(value: Any) -> Any:
    """Floats without a fraction as int: a column of counts in which one is missing has floats."""
    exact = isinstance(value, float) and value.is_integer()
    return int(value) if exact or isinstance(value, np.integer) else value


def _is_number(value: Any, low: float, high: float, kind: Any = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


class Controls(NamedTuple):
    """`Decoding` of each row as arrays [B], and its random key.

    keys: uint32 [B, 2], from `record_key`. stop_ids: int32 [B, STOP_IDS], filled up with -1.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    max_new_tokens: jax.Array
    stop_ids: jax.Array
    keys: jax.Array


def all_stop_ids(decoding: Decoding, stop_ids: Sequence[int]) -> list[int]:
    """The tokens that end a row of a model that stops at `stop_ids`.

    Raises:
      HumpbackError: there are more than 16.
    """
    found = sorted({*stop_ids, *decoding.stop_ids})
    if len(found) > STOP_IDS:
        raise HumpbackError(
            f"decoding: {len(found)} stop tokens, the model's own included; at most {STOP_IDS} are "
            "possible. Use stop_strings for some."
        )
    return found


def controls_of(
    decodings: Sequence[Decoding], keys: Sequence[np.ndarray], stop_ids: Sequence[int]
) -> Controls:
    """The arrays of rows that also stop at `stop_ids`, still on the host.

    Raises:
      HumpbackError: as `all_stop_ids`.
    """
    stops = np.full((len(decodings), STOP_IDS), -1, np.int32)
    for row, decoding in enumerate(decodings):
        all_ids = all_stop_ids(decoding, stop_ids)
        stops[row, : len(all_ids)] = all_ids

    def gather(name: str, dtype: str) -> np.ndarray:
        return np.array([getattr(decoding, name) for decoding in decodings], dtype)

    columns = [
        gather("temperature", "float32"),
        gather("top_p", "float32"),
        gather("top_k", "int32"),
        gather("min_p", "float32"),
        gather("repetition_penalty", "float32"),
        gather("max_new_tokens", "int32"),
    ]
    return Controls._make((*columns, stops, np.array(keys, np.uint32).reshape(-1, 2)))


def record_key(seed: int, stage: str, record_id: str, draw: int) -> np.ndarray:
    """uint32 [2]: the random key of one draw for one record, whatever stands beside it.

    The token at position i is drawn with fold_in(key, i).
    """
    text = f"{seed}\x1f{stage}\x1f{record_id}\x1f{draw}".encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), "<u4").astype(np.uint32)


def draw_tokens(
    logits: jax.Array, seen: jax.Array, positions: jax.Array, controls: Controls
) -> tuple[jax.Array, jax.Array]:
    """Draws the next token of each row.

    Args:
      logits: float32 [B, V]. seen: bool [B, V], tokens that the row contains so far.
      positions: int32 [B], how many tokens the row has drawn so far.

    Returns:
      (token int32 [B], its log-probability float32 [B] under the model itself, that is at
      temperature 1, without penalty and truncation).
    """
    adjusted = jax.lax.cond(
        (controls.repetition_penalty != 1).any(),
        _penalised,
        lambda x, *_: x,
        logits,
        seen,
        controls,
    )
    greedy = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
    token = jax.lax.cond(
        (controls.temperature > 0).any(), _sampled, lambda greedy, *_: greedy,
        greedy, adjusted, positions, controls,
    )  # fmt: skip
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def _penalised(logits: jax.Array, seen: jax.Array, controls: Controls) -> jax.Array:
    penalty = controls.repetition_penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _sampled(
    greedy: jax.Array, logits: jax.Array, positions: jax.Array, controls: Controls
) -> jax.Array:
    weights = truncated_probabilities(logits, controls)
    drawn = _inverse_cdf(weights, jax.vmap(_uniform)(controls.keys, positions))
    return jnp.where(controls.temperature > 0, drawn, greedy)


def truncated_probabilities(logits: jax.Array, controls: Controls) -> jax.Array:
    """Unnormalised probabilities [B, V] after temperature, top-k, top-p, min-p (ties kept).

    Each truncation is computed where some row asks for it, and leaves the rows that do not alone.
    """
    temperature = jnp.where(controls.temperature > 0, controls.temperature, 1.0)
    scaled = logits / temperature[:, None]
    weights = jnp.exp(scaled - scaled.max(axis=-1, keepdims=True))
    cut_k = (controls.top_k > 0) & (controls.top_k < logits.shape[-1])
    weights = jax.lax.cond(
        cut_k.any(),
        lambda weights: _keep_largest(
            weights, jnp.ones_like(weights), jnp.where(cut_k, controls.top_k, 0).astype("float32")
        ),
        lambda weights: weights,
        weights,
    )
    cut_p = controls.top_p < 1
    weights = jax.lax.cond(
        cut_p.any(),
        lambda weights: _keep_largest(
            weights, weights, jnp.where(cut_p, controls.top_p * weights.sum(axis=-1), 0.0)
        ),
        lambda weights: weights,
        weights,
    )
    return jnp.where(weights >= controls.min_p[:, None], weights, 0.0)


def _keep_largest(weights: jax.Array, measure: jax.Array, wanted: jax.Array) -> jax.Array:
    """Keeps the fewest largest weights whose total measure reaches `wanted` [B]; 0 keeps all.

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
    return jnp.where((bits >= threshold[:, None]) | (wanted <= 0)[:, None], weights, 0.0)


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
