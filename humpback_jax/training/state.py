"""What a training run carries from step to step: born on the mesh, and handed out at the end."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.kernels import XLA, Kernels
from humpback_jax.model.linear import LoraSpec, Precision
from humpback_jax.model.llama import Layout, Params, init_params, stack_layers, unstack_layers
from humpback_jax.model.lora import merge_adapter, split_adapter
from humpback_jax.model.remat import Remat
from humpback_jax.parallel.rules import abstract_params, everywhere, param_shardings, place
from humpback_jax.training.loss import NLL, Objective


class TrainState(NamedTuple):
    """`trainable` is what the optimizer sees: all parameters, or the adapter's alone."""

    step: jax.Array
    trainable: Params
    frozen: Params
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Everything static about a step; `PackingPlan` says what the two bounds are.

    mesh: the devices that share the step: rows lie over data and fsdp, parameters and the
      optimizer's state over fsdp and tensor (`parallel/rules.py`).
    """

    config: LlamaConfig
    layout: Layout
    precision: Precision
    max_targets: int
    num_sources: int
    lora: LoraSpec | None = None
    dropout: float = 0.0
    remat: Remat = "none"
    longest: int | None = None
    kernels: Kernels = XLA
    mesh: Mesh | None = None
    objective: Objective = NLL
    dropout_ramp: bool = False
    neftune_alpha: float = 0.0


def initial_state(
    spec: StepSpec, base: Params, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Float32 copies of the base weights in the training layout, with fresh optimizer state.

    Args:
      base: stacked, on the host or a device. On a mesh, no device ever holds all of it.
      seed: of a new adapter.
    """
    mesh = spec.mesh
    where = None if mesh is None else state_shardings(spec, optimizer)
    step = everywhere(np.zeros((), np.int32), mesh)

    def fresh_adapter() -> Params:
        # Drawn stacked in either layout, so that the layout does not change the result. Compiled,
        # the weights beside the adapter are never made.
        fresh = init_params(spec.config, jax.random.key(seed), lora=spec.lora)
        return _arranged(split_adapter(fresh)[1], spec.layout)

    if mesh is None:
        params = jax.jit(lambda base: _arranged(_float32(base), spec.layout))(base)
    else:
        shardings = param_shardings(spec.config, mesh, spec.layout)
        params = place(_arranged(base, spec.layout), shardings, _float32)
    frozen: Params = {}
    if spec.lora is not None:
        frozen = params
        params = jax.jit(fresh_adapter, out_shardings=where and where.trainable)()
    kept = jax.jit(optimizer.init, out_shardings=where and where.optimizer)(params)
    return TrainState(step, params, frozen, kept)


def finished_params(state: TrainState, spec: StepSpec) -> tuple[Params, Params | None]:
    """(full stacked parameters with the adapter merged, the stacked adapter or None)."""

    def stacked(params: Params) -> Params:
        return params if spec.layout == "scan" else stack_layers(params)

    if spec.lora is None:
        return stacked(state.trainable), None
    return stacked(merge_adapter(state.frozen, state.trainable, spec.lora)), stacked(
        state.trainable
    )


def _arranged(params: Params, layout: Layout) -> Params:
    return params if layout == "scan" else unstack_layers(params)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def state_shardings(spec: StepSpec, optimizer: optax.GradientTransformation) -> TrainState:
    """A NamedSharding for each array of a `TrainState` on the step's mesh.

    What the optimizer keeps of a parameter lies where that parameter lies, if it has its shape, or
    that of its rows or columns; all else is on every device.
    """
    mesh = spec.mesh
    assert mesh is not None
    on_all = NamedSharding(mesh, PartitionSpec())
    shardings = param_shardings(spec.config, mesh, spec.layout, spec.lora)
    shapes = abstract_params(spec.config, "float32", spec.layout, spec.lora)
    frozen: Params = {}
    if spec.lora is not None:
        frozen, shardings = split_adapter(shardings)
        _, shapes = split_adapter(shapes)

    def beside(kept: Any, shape: Any, sharding: Any) -> Any:
        axes = range(len(shape.shape))
        for left_out in (None, *reversed(axes)):
            rest = [axis for axis in axes if axis != left_out]
            if kept.shape == tuple(shape.shape[axis] for axis in rest):
                return NamedSharding(mesh, PartitionSpec(*(sharding.spec[axis] for axis in rest)))
        return on_all

    kept = optax.tree.map_params(
        optimizer,
        beside,
        jax.eval_shape(optimizer.init, shapes),
        shapes,
        shardings,
        transform_non_params=lambda _: on_all,
    )
    return TrainState._make((on_all, shardings, frozen, kept))
