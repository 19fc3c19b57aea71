"""Response-only cross-entropy as sums and counts, without ever holding tokens x vocabulary."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Llama

CHUNK = 512  # positions whose logits exist at one time


class Batch(NamedTuple):
    """Packed rows. Position i predicts `targets[i]`; only where `mask[i]` does that count.

    Every field is [rows, tokens]: int32 tokens, targets, positions (restarting with each example),
    segment_ids (from 1; 0 is padding), sources (index of the row's data source), and the boolean
    mask, which comes from tokenisation and is never derived from token values.
    """

    tokens: jax.Array
    targets: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    sources: jax.Array
    mask: jax.Array


class Targets(NamedTuple):
    """The supervised positions of a batch, gathered to the front of each row: [rows, M]."""

    columns: jax.Array
    targets: jax.Array
    weights: jax.Array


def supervised_targets(batch: Batch, max_targets: int) -> Targets:
    """Gathers at most `max_targets` supervised positions a row, in order.

    The caller guarantees that no row has more (`packing.max_targets`).
    """
    order = jnp.argsort(~batch.mask, axis=1, stable=True)[:, :max_targets]
    return Targets(
        columns=order,
        targets=jnp.take_along_axis(batch.targets, order, axis=1),
        weights=jnp.take_along_axis(batch.mask, order, axis=1).astype(jnp.float32),
    )


def token_nll(
    model: Llama, hidden: jax.Array, chosen: Targets, precision: Precision
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihoods of the supervised tokens.

    Args:
      hidden: [rows, tokens, D] from `Llama.hidden_states`.

    Returns:
      (sum over supervised tokens, nll [rows, M] with 0 at unused places), float32, in nats. The
      gradient flows through the sum alone.
    """
    rows, count = chosen.columns.shape
    picked = jnp.take_along_axis(hidden, chosen.columns[..., None], axis=1)
    if model.config.tie_word_embeddings:
        kernel, vocab_axis = model.embed.embedding[...], 0
    else:
        kernel, vocab_axis = model.lm_head.kernel[...], 1
    total, nll = _projected_nll(
        picked.reshape(rows * count, -1),
        kernel,
        chosen.targets.reshape(-1),
        chosen.weights.reshape(-1),
        vocab_axis,
        precision.compute,
    )
    return total, nll.reshape(rows, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _projected_nll(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    vocab_axis: int,
    compute: str,
) -> tuple[jax.Array, jax.Array]:
    """Weighted cross-entropy of softmax(hidden @ kernel), chunk by chunk.

    The forward pass of differentiation computes the gradient at once, while a chunk's logits
    exist: they are neither kept nor computed twice.
    """

    def chunk_nll(_: None, chunk: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        h, target, weight = chunk
        logits = _logits(h, kernel, vocab_axis, compute)
        return None, weight * (jax.nn.logsumexp(logits, axis=-1) - _pick(logits, target))

    _, nll = jax.lax.scan(chunk_nll, None, _chunks(hidden, targets, weights))
    nll = nll.reshape(-1)[: hidden.shape[0]]
    return nll.sum(), nll


def _forward(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    vocab_axis: int,
    compute: str,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    cast = kernel.astype(compute)

    def chunk_gradient(
        dkernel: jax.Array, chunk: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        h, target, weight = chunk
        logits = _logits(h, cast, vocab_axis, compute)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nll = weight * (log_z - _pick(logits, target))
        probabilities = jnp.exp(logits - log_z[:, None])
        is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == target[:, None]
        dlogits = ((probabilities - is_target) * weight[:, None]).astype(compute)
        dhidden = _dot(dlogits, cast, (1, vocab_axis))
        pair = (dlogits, h.astype(compute)) if vocab_axis == 0 else (h.astype(compute), dlogits)
        return dkernel + _dot(*pair, (0, 0)), (nll, dhidden)

    start = jnp.zeros(kernel.shape, jnp.float32)
    dkernel, (nll, dhidden) = jax.lax.scan(chunk_gradient, start, _chunks(hidden, targets, weights))
    nll = nll.reshape(-1)[: hidden.shape[0]]
    dhidden = dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    residuals = dhidden.astype(hidden.dtype), dkernel.astype(kernel.dtype), targets
    return (nll.sum(), nll), residuals


def _backward(
    vocab_axis: int,
    compute: str,
    residuals: tuple[jax.Array, jax.Array, jax.Array],
    gradients: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None, None]:
    dhidden, dkernel, _ = residuals
    scale, _ = gradients
    return dhidden * scale.astype(dhidden.dtype), dkernel * scale.astype(dkernel.dtype), None, None


_projected_nll.defvjp(_forward, _backward)


def _logits(hidden: jax.Array, kernel: jax.Array, vocab_axis: int, compute: str) -> jax.Array:
    return _dot(hidden.astype(compute), kernel.astype(compute), (1, 1 - vocab_axis))


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type="float32")


def _pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]


def _chunks(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[N, ...] -> [ceil(N / CHUNK), CHUNK, ...], zero-padded: padding carries weight 0."""
    size = min(CHUNK, arrays[0].shape[0])
    count = -(-arrays[0].shape[0] // size)
    padded = []
    for array in arrays:
        widths = [(0, count * size - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
        padded.append(jnp.pad(array, widths).reshape(count, size, *array.shape[1:]))
    return tuple(padded)
