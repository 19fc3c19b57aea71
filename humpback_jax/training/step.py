"""One optimizer step: gradients by sums and counts over micro-batches, then the update."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

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
    spec: StepSpec, params: Params, batch: Batch, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(the objective's sum over supervised tokens, nll by source [sources]) of rows [rows, T]."""
    model = bind(spec.config, params, spec.layout, spec.lora)
    kernels = dataclasses.replace(spec.kernels, mesh=spec.mesh)
    depth = spec.config.num_hidden_layers
    rate: float | jax.Array = spec.dropout
    if spec.dropout and spec.dropout_ramp:
        rate = jnp.linspace(0.0, spec.dropout, depth)

    def embedded(x: jax.Array) -> jax.Array:
        if dropout_key is None or not spec.neftune_alpha:
            return x
        key = jax.random.fold_in(dropout_key, depth)  # those of the layers are before it
        return with_noise(x, batch.segment_ids, spec.neftune_alpha, key)

    hidden, _ = model.hidden_states(
        batch.tokens,
        batch.positions,
        kernels.packed(batch.segment_ids, batch.positions, spec.precision, spec.longest),
        precision=spec.precision,
        dropout_rate=rate,
        dropout_key=dropout_key,
        remat=spec.remat,
        placed=lambda x: keep_rows_apart(x, spec.mesh),
        look_up=lambda table, tokens: look_up(table, tokens, spec.mesh),
        embedded=embedded,
    )
    chosen = supervised_targets(batch, spec.max_targets, spec.mesh)
    total, nll = token_nll(model, hidden, chosen, spec.precision, spec.mesh, spec.objective)
    sources = chosen.pick(batch.sources)
    by_source = jnp.zeros((spec.num_sources,), jnp.float32).at[sources].add(nll)
    return total, by_source


def make_train_step(spec: StepSpec, optimizer: optax.GradientTransformation) -> jax.stages.Wrapped:
    """Builds the jitted step. The state is donated, and stays where it lies.

    The step takes a batch [micro-batches, rows, tokens] and the run's dropout key, from which the
    key of a micro-batch is folded by (step, index).
    """

    noisy = spec.dropout > 0 or spec.neftune_alpha > 0
    noisy = noisy or (spec.lora is not None and spec.lora.dropout > 0)

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, StepMetrics]:
        count = batch.mask.sum().astype(jnp.float32)
        step_key = jax.random.fold_in(key, state.step)

        def mean_nll(
            trainable: Params, micro: Batch, index: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            dropout_key = jax.random.fold_in(step_key, index)
            total, by_source = batch_nll(
                spec, join(state.frozen, trainable), micro, dropout_key if noisy else None
            )
            return total / count, by_source

        def gradient(*arguments: Any) -> tuple[Params, jax.Array]:
            grads, nll = jax.grad(mean_nll, has_aux=True)(*arguments)
            if where is not None:
                grads = jax.lax.with_sharding_constraint(grads, where.trainable)
            return grads, nll

        micro_batches = batch.mask.shape[0]
        if micro_batches == 1:
            sums = gradient(state.trainable, jax.tree.map(lambda x: x[0], batch), jnp.int32(0))
        else:
            # Rows are filled from the first on: what a small batch leaves empty are the last ones.
            filled = (batch.segment_ids > 0).any((1, 2)).sum()

            def accumulate(index: jax.Array, sums: Any) -> Any:
                micro = jax.tree.map(
                    lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batch
                )
                return jax.tree.map(jnp.add, sums, gradient(state.trainable, micro, index))

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
    return jax.jit(step, donate_argnums=0, out_shardings=results)
