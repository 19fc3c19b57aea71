"""Response-only cross-entropy as sums and counts, without ever holding tokens x vocabulary."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Llama
from humpback_jax.model.shares import ROWS
from humpback_jax.parallel.batches import row_parts
from humpback_jax.parallel.rules import constrain, partition

CHUNK = 512  # positions whose logits exist at one time, on each device, at most


class Batch(NamedTuple):
    """Packed rows. Position i predicts `targets[i]`; only where `mask[i]` does that count.

    Every field is [rows, tokens]: int32 tokens, targets, positions (restarting with each example),
    segment_ids (from 1; 0 is padding), sources (index of the row's data source), the boolean mask,
    which comes from tokenisation and is never derived from token values, and uint32 keys, which say
    whose noise a token gets: part of a hash of its example's source and id.
    """

    tokens: jax.Array
    targets: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    sources: jax.Array
    mask: jax.Array
    keys: jax.Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised, for each supervised token: nll, and what is added to it.

    label_smoothing: share e of the target's weight that all tokens get alike, so that the loss is
      (1 - e) nll + e (log Z - mean logit) (Szegedy et al., 2016).
    z_loss: weight of (log Z)^2, which keeps logits from drifting (PaLM, section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def value(self, logits: jax.Array, picked: jax.Array, log_z: jax.Array) -> jax.Array:
        """[...] of logits [..., V], and those of the targets [...]."""
        value = log_z - picked
        if self.label_smoothing:
            value = value + self.label_smoothing * (picked - logits.mean(-1))
        if self.z_loss:
            value = value + self.z_loss * jnp.square(log_z)
        return value

    def gradient(self, logits: jax.Array, is_target: jax.Array, log_z: jax.Array) -> jax.Array:
        """Of `value` by the logits: [..., V]."""
        probabilities = jnp.exp(logits - log_z[..., None])
        if self.z_loss:
            probabilities = probabilities * (1 + 2 * self.z_loss * log_z[..., None])
        if not self.label_smoothing:
            return probabilities - is_target
        shared = self.label_smoothing / logits.shape[-1]
        return probabilities - (1 - self.label_smoothing) * is_target - shared


NLL = Objective()


class Targets(NamedTuple):
    """The positions of a batch, the supervised ones first: for each of P devices, N places.

    Attributes:
      places: int32 [P, N], of the device's rows laid end to end.
      targets, weights: [P, N]; weights are float32, 0 at unused places.
      most: int32 [], no device has more supervised positions.
    """

    places: jax.Array
    targets: jax.Array
    weights: jax.Array
    most: jax.Array

    def pick(self, x: jax.Array) -> jax.Array:
        """x [rows, tokens, ...] -> [P, N, ...]."""
        parts, count = self.places.shape
        by_device = x.reshape(parts, -1, *x.shape[2:])
        places = self.places.reshape(parts, count, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(by_device, places, axis=1)


def supervised_targets(batch: Batch, mesh: Mesh | None = None) -> Targets:
    """Gathers the supervised positions, in order.

    On a mesh, rows are a multiple of `row_parts(mesh)`.
    """
    mask = batch.mask.reshape(row_parts(mesh), -1)
    places = jnp.argsort(~mask, axis=1, stable=True)
    weights = jnp.take_along_axis(mask, places, axis=1).astype(jnp.float32)
    targets = jnp.take_along_axis(batch.targets.reshape(mask.shape), places, axis=1)
    return Targets(places, targets, weights, mask.sum(axis=1).max())


def token_nll(
    model: Llama,
    hidden: jax.Array,
    chosen: Targets,
    precision: Precision,
    mesh: Mesh | None = None,
    objective: Objective = NLL,
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihoods of the supervised tokens, and what is minimised.

    Args:
      hidden: [rows, tokens, D] from `Llama.hidden_states`.

    Returns:
      (the objective's weighted sum over supervised tokens, nll [P, N] without weights, 0 at unused
      places), float32, in nats. The gradient flows through the sum alone.
    """
    if model.config.tie_word_embeddings:
        kernel, scale, vocab_axis = model.embed.embedding[...], model.embed.scale, 0
    else:
        kernel, scale, vocab_axis = model.lm_head.kernel[...], model.lm_head.scale, 1
    if scale is not None:  # int8, beside an adapter
        kernel = kernel * jnp.expand_dims(scale[...], 1 - vocab_axis)
    return _projected_nll(
        chosen.pick(hidden),
        kernel,
        chosen.targets,
        chosen.weights,
        chosen.most,
        vocab_axis,
        precision.compute,
        mesh,
        objective,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _projected_nll(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    count: jax.Array,
    vocab_axis: int,
    compute: str,
    mesh: Mesh | None,
    objective: Objective,
) -> tuple[jax.Array, jax.Array]:
    """Weighted cross-entropy of softmax(hidden @ kernel), chunk by chunk.

    Args:
      hidden: [P, N, D], for each of P devices the places of its rows; targets, weights: [P, N].
      count: int32 []: places from there on have weight 0, and cost nothing.

    Returns:
      (the objective's weighted sum [], nll [P, N]). The forward pass of a gradient computes the
      gradient at once, while a chunk's logits exist: they are neither kept nor computed twice.
    """
    cast = _head(kernel, vocab_axis, compute, mesh)
    chunks = _chunks(compute, hidden, targets, weights)

    def chunk_nll(index: jax.Array, sums: tuple[jax.Array, jax.Array]) -> Any:
        total, nll = sums
        h, target, weight = (_at(x, index) for x in chunks)
        logits = _logits(h, cast, vocab_axis)
        log_z, picked = jax.nn.logsumexp(logits, axis=-1), _pick(logits, target, mesh)
        total += (weight * objective.value(logits, picked, log_z)).sum()
        return total, _put(nll, index, jnp.where(weight > 0, log_z - picked, 0))

    start = jnp.float32(0), _zeros_like(chunks[2], mesh)
    total, nll = jax.lax.fori_loop(0, _used(chunks, count), chunk_nll, start)
    return total, _unchunked(nll, hidden.shape[1])


def _forward(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    count: jax.Array,
    vocab_axis: int,
    compute: str,
    mesh: Mesh | None,
    objective: Objective,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    cast = _head(kernel, vocab_axis, compute, mesh)
    chunks = _chunks(compute, hidden, targets, weights)

    def chunk_gradient(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, dkernel, nll, dhidden = sums
        h, target, weight = (_at(x, index) for x in chunks)
        logits = _logits(h, cast, vocab_axis)
        log_z, picked = jax.nn.logsumexp(logits, axis=-1), _pick(logits, target, mesh)
        total += (weight * objective.value(logits, picked, log_z)).sum()
        dlogits = objective.gradient(logits, _is_target(logits, target), log_z)
        dlogits = (dlogits * weight[..., None]).astype(compute)
        pair = (dlogits, h) if vocab_axis == 0 else (h, dlogits)
        dkernel += _dot(*pair, (1, 1), batch=(0,))
        dhidden = _put(dhidden, index, _dot(dlogits, cast, (2, vocab_axis)))
        return total, dkernel, _put(nll, index, jnp.where(weight > 0, log_z - picked, 0)), dhidden

    # Each device sums over its own places, so that all devices add up once and not in every chunk.
    sums = jnp.zeros((hidden.shape[0], *kernel.shape), jnp.float32)
    start = (
        jnp.float32(0),
        constrain(sums, mesh, P(ROWS, *_vocab_parts(kernel, vocab_axis, mesh))),
        _zeros_like(chunks[2], mesh),
        _zeros_like(chunks[0], mesh),
    )
    used = _used(chunks, count)
    total, dkernel, nll, dhidden = jax.lax.fori_loop(0, used, chunk_gradient, start)
    nll, dhidden = _unchunked(nll, hidden.shape[1]), _unchunked(dhidden, hidden.shape[1])
    return (total, nll), (dhidden.astype(hidden.dtype), dkernel.sum(0).astype(kernel.dtype))


def _backward(
    vocab_axis: int,
    compute: str,
    mesh: Mesh | None,
    objective: Objective,
    residuals: tuple[jax.Array, jax.Array],
    gradients: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None, None, None]:
    dhidden, dkernel = residuals
    scale, _ = gradients
    # The scale itself in bfloat16 would make all gradients longer, or shorter, by up to 0.4 %.
    scaled = [(scale * gradient).astype(gradient.dtype) for gradient in (dhidden, dkernel)]
    return scaled[0], scaled[1], None, None, None


_projected_nll.defvjp(_forward, _backward)


def _head(kernel: jax.Array, vocab_axis: int, compute: str, mesh: Mesh | None) -> jax.Array:
    """The head for products: along fsdp it is put together once, not in every chunk."""
    return constrain(kernel.astype(compute), mesh, P(*_vocab_parts(kernel, vocab_axis, mesh)))


def _vocab_parts(kernel: jax.Array, vocab_axis: int, mesh: Mesh | None) -> list[str | None]:
    """The mesh axis of each of the kernel's axes, where only the vocabulary is cut."""
    axes: list[str | None] = [None, None]
    if mesh is not None:
        axes[vocab_axis] = partition(("vocab",), kernel.shape[vocab_axis : vocab_axis + 1], mesh)[0]
    return axes


def _logits(hidden: jax.Array, kernel: jax.Array, vocab_axis: int) -> jax.Array:
    return _dot(hidden, kernel, (2, 1 - vocab_axis))


def _dot(
    a: jax.Array, b: jax.Array, contract: tuple[int, int], batch: tuple[int, ...] = ()
) -> jax.Array:
    dimensions = (((contract[0],), (contract[1],)), (batch, batch))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type="float32")


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]


def _pick(logits: jax.Array, targets: jax.Array, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # Along a vocabulary that is cut, a sum stays where the logits are; XLA would move them to look
    # one up.
    return jnp.where(_is_target(logits, targets), logits, 0).sum(-1)


def _chunks(compute: str, hidden: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[P, N, ...] -> [ceil(N / C), P, C, ...], zero-padded: padding carries weight 0.

    C is the `chunk_size` of N places.
    """
    size = chunk_size(hidden.shape[1])
    count = -(-hidden.shape[1] // size)
    cut = []
    for array in (hidden.astype(compute), *arrays):
        widths = [(0, 0), (0, count * size - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
        padded = jnp.pad(array, widths)
        cut.append(jnp.moveaxis(padded.reshape(-1, count, size, *array.shape[2:]), 1, 0))
    return tuple(cut)


def chunk_size(places: int) -> int:
    """Of so many places of a device, how many have logits at one time.

    A quarter: half of the last chunk is wasted on average, and each costs a sum over the whole
    head's gradient.
    """
    return min(places, CHUNK, max(places // 4 // 64 * 64, 64))


def _used(chunks: Sequence[jax.Array], count: jax.Array) -> jax.Array:
    size = chunks[0].shape[2]
    return (count + size - 1) // size


def _at(chunks: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(chunks, index, keepdims=False)


def _put(chunks: jax.Array, index: jax.Array, value: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(chunks, value, index, 0)


def _zeros_like(chunks: jax.Array, mesh: Mesh | None) -> jax.Array:
    return constrain(jnp.zeros(chunks.shape, jnp.float32), mesh, P(None, ROWS))


def _unchunked(chunks: jax.Array, places: int) -> jax.Array:
    """[chunks, P, C, ...] -> [P, N, ...]."""
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :places]
