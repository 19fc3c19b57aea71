"""What a training run carries from step to step: born on the mesh, and handed out at the end."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import (
    Layout,
    Params,
    flatten,
    init_params,
    stack_layers,
    unflatten,
    unstack_layers,
)
from humpback_jax.model.lora import merge_adapter, split_adapter, with_magnitudes, with_norms
from humpback_jax.parallel.rules import (
    abstract_params,
    everywhere,
    param_shardings,
    place,
    place_int8,
)
from humpback_jax.training.options import StepOptions


class TrainState(NamedTuple):
    """`trainable` is what the optimizer sees: all parameters, or the adapter's alone."""

    step: jax.Array
    trainable: Params
    frozen: Params
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class StepSpec(StepOptions):
    """Everything static about a step; `PackingPlan` says what `longest` and `widths` are.

    widths: () for rows as they come.
    weights: in the loss, of the tokens of each source; () where all count alike.
    """

    config: LlamaConfig
    num_sources: int
    longest: int | None = None
    widths: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def initial_state(
    spec: StepSpec,
    base: Params,
    optimizer: optax.GradientTransformation,
    seed: int,
    saved: TrainState | None = None,
) -> TrainState:
    """A copy of the base weights in the training layout, with fresh optimizer state.

    All is float32, but for the weights under an adapter whose spec asks for an int8 base.

    Args:
      base: stacked, on the host or a device. On a mesh, no device ever holds all of it.
      seed: of a new adapter.
      saved: what a stopped run left, of the form of `abstract_state`: goes on from there. Beside
        it, nothing but `frozen` is made.
    """
    mesh = spec.mesh
    where = None if mesh is None else state_shardings(spec, optimizer)
    step = everywhere(np.zeros((), np.int32), mesh)

    def fresh_adapter(frozen: Params) -> Params:
        # Drawn stacked in either layout, so that the layout does not change the result. Compiled,
        # the weights beside the adapter are never made.
        fresh = init_params(spec.config, jax.random.key(seed), lora=spec.lora)
        return with_magnitudes(_arranged(split_adapter(fresh)[1], spec.layout), frozen)

    frozen: Params = {}
    if spec.lora is not None:
        frozen = _int8_base(spec, base) if _int8(spec) else _float32_base(spec, base)
    if saved is not None:
        return saved._replace(frozen=frozen)
    if spec.lora is None:
        params = _float32_base(spec, base)
    else:
        params = jax.jit(fresh_adapter, out_shardings=where and where.trainable)(frozen)
    kept = jax.jit(optimizer.init, out_shardings=where and where.optimizer)(params)
    return TrainState(step, params, frozen, kept)


def abstract_state(spec: StepSpec, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes of an `initial_state`, and where its arrays lie."""
    shapes, frozen = _abstract_weights(spec)
    step, kept = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(optimizer.init, shapes)
    state = TrainState._make((step, shapes, frozen, kept))
    if spec.mesh is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        where = jax.tree.map(lambda _: here, state)
    else:
        where = state_shardings(spec, optimizer)
    return jax.tree.map(_placed, state, where)


def _abstract_weights(spec: StepSpec) -> tuple[Params, Params]:
    """Shapes of (what is trained, what is frozen)."""
    params = abstract_params(spec.config, "float32", spec.layout, spec.lora, quantize=_int8(spec))
    if spec.lora is None:
        return params, {}
    frozen, adapter = split_adapter(params)
    return adapter, frozen


def _int8(spec: StepSpec) -> bool:
    return spec.lora is not None and spec.lora.base == "int8"


def _placed(shape: Any, where: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


def _float32_base(spec: StepSpec, base: Params) -> Params:
    """A float32 copy in the layout of training, on the mesh."""
    if spec.mesh is None:
        return jax.jit(lambda base: _arranged(_float32(base), spec.layout))(base)
    shardings = param_shardings(spec.config, spec.mesh, spec.layout)
    return place(_arranged(base, spec.layout), shardings, _float32)


def _int8_base(spec: StepSpec, base: Params) -> Params:
    """An int8 copy, norms and biases in float32; a wider one of all weights is never made."""
    arranged = _arranged(base, spec.layout)
    return place_int8(arranged, spec.config, spec.mesh, spec.layout, _float32_copy)


def finished_params(
    state: TrainState, spec: StepSpec, base: Params
) -> tuple[Params, Params | None]:
    """(full stacked parameters with the adapter merged, the stacked adapter or None).

    Args:
      base: what training began with. The adapter is merged into it leaf by leaf, on the host where
        one process holds all of the adapter: the devices are full of frozen weights, maybe in
        int8, to which nothing can be added.
    """

    def stacked(params: Params) -> Params:
        return params if spec.layout == "scan" else stack_layers(params)

    if spec.lora is None:
        return stacked(state.trainable), None
    adapter = flatten(stacked(state.trainable))
    where: dict[Any, Any] = {}
    if spec.mesh is not None and not all(leaf.is_fully_addressable for leaf in adapter.values()):
        where = flatten(param_shardings(spec.config, spec.mesh))
    params, held = {}, {}
    for path, leaf in flatten(base).items():
        if path in where:
            wide = place({"leaf": leaf}, {"leaf": where[path]}, _float32)["leaf"]
        else:
            wide = np.asarray(leaf).astype(np.float32, copy=False)
        own = {name: part for name, part in adapter.items() if name[:-1] == path[:-1]}
        if path[-1] == "kernel" and own:
            kernel = unflatten({path: wide})
            module = with_norms(kernel, unflatten(own), spec.lora)
            held.update(flatten(module))
            wide = flatten(merge_adapter(kernel, module, spec.lora))[path]
        params[path] = wide
    return unflatten(params), unflatten(held)


def _arranged(params: Params, layout: Layout) -> Params:
    return params if layout == "scan" else unstack_layers(params)


def _float32_copy(leaf: Any) -> Any:
    """Of its own in any case: a step takes the state's arrays, and the base is needed after it."""
    return leaf.astype(jnp.float32, copy=True)


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
    shardings = param_shardings(spec.config, mesh, spec.layout, spec.lora, _int8(spec))
    shapes, _ = _abstract_weights(spec)
    frozen: Params = {}
    if spec.lora is not None:
        frozen, shardings = split_adapter(shardings)

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


def stacked_state(state: TrainState) -> TrainState:
    """The state with its layers stacked, whichever layout it is trained in: how it is stored."""
    if not _kept_apart(state.trainable):
        return state
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_stacked(state))
    return jax.jit(lambda state: _stack_all(state, _stacked), out_shardings=where)(state)


def abstract_stacked(state: TrainState) -> TrainState:
    """Shapes of `stacked_state`, and where its arrays lie."""
    shapes = jax.tree.map(lambda leaf: _placed(leaf, leaf.sharding), state)
    return _stack_all(shapes, _stacked_shape)


def laid_out_like(state: TrainState, stacked: TrainState) -> TrainState:
    """`stacked` in the layout of `state`, where `state` lies: undoes `stacked_state`.

    Takes the arrays of `stacked` apart one by one and deletes them: where a state just fits, two
    do not.
    """
    if not _kept_apart(state.trainable):
        return stacked
    apart = functools.partial(_taken_apart, layers=len(state.trainable["layers"]))
    return _each_tree(
        lambda tree: unstack_layers(tree, apart) if isinstance(tree, dict) else tree, stacked
    )


def _stack_all(state: TrainState, stack: Callable[[list[Any]], Any]) -> TrainState:
    def stacked(params: Any) -> Any:
        apart = isinstance(params, dict) and _kept_apart(params)
        return stack_layers(params, stack) if apart else params

    return _each_tree(stacked, state)


# What optax puts in the place of something that it does not keep of a parameter: of stacked layers,
# it puts one.
PLACEHOLDER = (1,)


def _stacked(layers: list[jax.Array]) -> jax.Array:
    return layers[0] if layers[0].shape == PLACEHOLDER else jnp.stack(layers)


def _stacked_shape(layers: list[jax.ShapeDtypeStruct]) -> jax.ShapeDtypeStruct:
    first = layers[0]
    if first.shape == PLACEHOLDER:
        return first
    where = first.sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec(None, *where.spec))
    return jax.ShapeDtypeStruct((len(layers), *first.shape), first.dtype, sharding=where)


def _taken_apart(leaf: jax.Array, layers: int) -> list[jax.Array]:
    if leaf.shape == PLACEHOLDER:
        return [leaf.copy() for _ in range(layers)]  # each is donated
    where = [_sharding_apart(leaf.sharding)] * len(leaf)
    apart = jax.block_until_ready(jax.jit(list, out_shardings=where)(leaf))
    leaf.delete()
    return apart


def _kept_apart(params: Params) -> bool:
    return any(isinstance(name, int) for name in params["layers"])


def _each_tree(change: Callable[[Any], Any], state: TrainState) -> TrainState:
    """`change` of the parameters, and of all that the optimizer keeps in their form."""
    return jax.tree.map(change, state, is_leaf=lambda node: isinstance(node, dict) and bool(node))


def _sharding_apart(stacked: Sharding) -> Sharding:
    """Of a layer's leaf; the inverse of what `_stacked_shape` does."""
    if isinstance(stacked, NamedSharding):
        return NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:]))
    return stacked
