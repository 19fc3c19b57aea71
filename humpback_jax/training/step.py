"""One optimizer step: gradients by sums and counts over micro-batches, then the update."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from humpback_jax.model.linear import folded
from humpback_jax.model.llama import Params, bind
from humpback_jax.model.lora import join
from humpback_jax.parallel.batches import keep_rows_apart, look_up
from humpback_jax.training.loss import Batch, supervised_targets, token_nll
from humpback_jax.training.neftune import with_noise
from humpback_jax.training.state import StepSpec, TrainState, state_shardings


class StepMetrics(NamedTuple):
    """Sums of one step, so that any average is one division later. All float32 or int32."""

    nll: jax.Array  # [sources], nats over supervised tokens
    supervised: jax.Array  # [sources]
    tokens: jax.Array  # [], places in use
    grad_norm: jax.Array  # [], before clipping


def batch_nll(
    spec: StepSpec, params: Params, batch: Batch, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(the objective's weighted sum over supervised tokens, nll by source [sources]) of rows
    [rows, T].
    """
    model = bind(spec.config, params, spec.layout, spec.lora)
    kernels = dataclasses.replace(spec.kernels, mesh=spec.mesh)
    depth = spec.config.num_hidden_layers
    keys = None if key is None else token_keys(key, batch)
    rate: float | jax.Array = spec.dropout
    if spec.dropout and spec.dropout_ramp:
        rate = jnp.linspace(0.0, spec.dropout, depth)

    def embedded(x: jax.Array) -> jax.Array:
        if keys is None or not spec.neftune_alpha:
            return x
        # The layers fold in the numbers before `depth`.
        return with_noise(x, batch.segment_ids, spec.neftune_alpha, folded(keys, depth))

    hidden, _ = model.hidden_states(
        batch.tokens,
        batch.positions,
        kernels.packed(batch.segment_ids, batch.positions, spec.precision, spec.longest),
        precision=spec.precision,
        dropout_rate=rate,
        dropout_keys=keys,
        remat=spec.remat,
        placed=lambda x: keep_rows_apart(x, spec.mesh),
        look_up=lambda table, tokens: look_up(table, tokens, spec.mesh),
        embedded=embedded,
    )
    chosen = supervised_targets(batch, spec.mesh)
    sources = chosen.pick(batch.sources)
    if spec.weights:
        chosen = chosen._replace(weights=chosen.weights * jnp.array(spec.weights)[sources])
    total, nll = token_nll(model, hidden, chosen, spec.precision, spec.mesh, spec.objective)
    by_source = jnp.zeros((spec.num_sources,), jnp.float32).at[sources].add(nll)
    return total, by_source


def token_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """[rows, T]: keys of each token's noise, of its example and its place in it.

    However a batch is packed and cut, and whatever shares a row, noise is the same.
    """

    def of_token(example: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, example), position)

    return jax.vmap(jax.vmap(of_token))(batch.keys, batch.positions)


def _weight(batch: Batch, weights: tuple[float, ...]) -> jax.Array:
    """[]: of all supervised tokens of a batch, i.e. their number where all count alike."""
    if not weights:
        return batch.mask.sum().astype(jnp.float32)
    return (batch.mask * jnp.array(weights)[batch.sources]).sum()


def make_train_step(spec: StepSpec, optimizer: optax.GradientTransformation) -> jax.stages.Wrapped:
    """Builds the jitted step. The state is donated, and stays where it lies.

    The step takes a batch [micro-batches, rows, tokens] and the run's key, from which the noise of
    each token is drawn (`token_keys`).
    """

    noisy = spec.dropout > 0 or spec.neftune_alpha > 0
    noisy = noisy or (spec.lora is not None and spec.lora.dropout > 0)

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, StepMetrics]:
        count = _weight(batch, spec.weights)
        widths = spec.widths or batch.mask.shape[-1:]
        step_key = jax.random.fold_in(key, state.step)

        def mean_nll(trainable: Params, micro: Batch) -> tuple[jax.Array, jax.Array]:
            params = join(state.frozen, trainable)
            total, by_source = batch_nll(spec, params, micro, step_key if noisy else None)
            return total / count, by_source

        def gradient(micro: Batch) -> tuple[Params, jax.Array]:
            def of_width(width: int) -> tuple[Params, jax.Array]:
                cut = jax.tree.map(lambda x: x[:, :width], micro)
                return jax.grad(mean_nll, has_aux=True)(state.trainable, cut)

            used = (micro.segment_ids > 0).sum(1).max()
            choice = jnp.searchsorted(jnp.array(widths[:-1], jnp.int32), used)
            branches = [functools.partial(of_width, width) for width in widths]
            grads, nll = jax.lax.switch(choice, branches)
            if where is not None:
                grads = jax.lax.with_sharding_constraint(grads, where.trainable)
            return grads, nll

        if batch.mask.shape[0] == 1:
            sums = gradient(jax.tree.map(lambda x: x[0], batch))
        else:
            # Rows are filled from the first on: what a small batch leaves empty are the last ones.
            filled = (batch.segment_ids > 0).any((1, 2)).sum()

            def accumulate(index: jax.Array, sums: Any) -> Any:
                micro = jax.tree.map(
                    lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batch
                )
                return jax.tree.map(jnp.add, sums, gradient(micro))

            first = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable)
            if where is not None:
                first = jax.lax.with_sharding_constraint(first, where.trainable)
            start = first, jnp.zeros((spec.num_sources,), jnp.float32)
            sums = jax.lax.fori_loop(0, filled, accumulate, start)
        grads, nll = sums
        updates, opt_state = optimizer.update(grads, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        supervised = jnp.zeros((spec.num_sources,), jnp.int32).at[batch.sources].add(batch.mask)
        metrics = StepMetrics(
            nll, supervised, (batch.segment_ids > 0).sum(), optax.tree.norm(grads)
        )
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics

    where = None if spec.mesh is None else state_shardings(spec, optimizer)
    # The step's number is on every device, and so are the metrics.
    results = None if where is None else (where, where.step)
    return jax.jit(
        step, donate_argnums=0, out_shardings=results, compiler_options=_compiler_options(spec)
    )


def _compiler_options(spec: StepSpec) -> dict[str, Any] | None:
    """What XLA does not do by itself.

    On a CPU: compute again what `remat` leaves out when it is wanted. By default it orders a
    program for concurrency: what does not wait for the backward pass is then computed early, and
    kept. Orders for memory are a few percent slower, so that they are used only where memory is
    asked for.

    On several TPU chips: add up beside products. On some slices XLA makes sums on all chips of the
    scattered sums of gradients and of the gathering of weights, since those use all of a chip's
    links at once; by default every product waits for them.
    """
    devices = jax.devices() if spec.mesh is None else spec.mesh.devices.flat
    platform = devices[0].platform
    if platform == "cpu" and spec.remat != "none":
        return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    if platform == "tpu" and spec.mesh is not None and spec.mesh.size > 1:
        return {
            "xla_enable_async_all_reduce": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        }
    return None
