"""Which axis of which array lies on which axis of the mesh: one table, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.linear import LoraSpec
from humpback_jax.model.llama import Layout, Params, abstract_model, flatten, unflatten
from humpback_jax.model.quantize import QUANTIZED_ALONG, quantize

# Logical axis -> mesh axis. A model's width goes to fsdp; everything that a layer computes in
# parallel to tensor (Shoeybi et al., 2019).
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "lora_rank": None,
    "layers": None,
    "rows": "data",
}
# Whole on every device where they do not divide: heads are never cut in two, and an added token
# makes a vocabulary odd.
MAY_STAY_WHOLE = ("heads", "kv_heads", "vocab")
WIDTHS = {"fsdp": "the model's width", "tensor": "the inner width of its MLP"}
WHOLE_SHARE = 0.05  # of the weights along an axis, at most, besides those


def partition(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh,
    units: dict[str, int] | None = None,
) -> PartitionSpec:
    """Where an array goes whose dimensions have these logical axes.

    A dimension that does not divide evenly stays whole on every device.

    Args:
      units: what an axis is counted in, where that is not single elements: heads are never cut.

    Raises:
      HumpbackError: an axis is not in the table, or two go to the same axis of the mesh.
    """
    placed: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in RULES:
            raise HumpbackError(f"logical axis {name!r} has no rule; add it to parallel/rules.py.")
        axis = None if name is None else RULES[name]
        count = size if name is None else (units or {}).get(name, size)
        placed.append(axis if axis is not None and count % mesh.shape[axis] == 0 else None)
    used = [axis for axis in placed if axis is not None]
    if len(used) != len(set(used)):
        raise HumpbackError(
            f"two of the axes {tuple(axes)} go to the same axis of the mesh; see parallel/rules.py."
        )
    return PartitionSpec(*placed)


def head_units(config: LlamaConfig) -> dict[str, int]:
    """Query and key/value heads, which may only be cut between heads."""
    return {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}


def check_sharded(config: LlamaConfig, mesh: Mesh) -> None:
    """Refuses a mesh that leaves what it was to cut whole on every device.

    Heads and the vocabulary may stay whole along tensor (`MAY_STAY_WHOLE`): where nothing else
    does, the bulk of a layer is cut.

    Raises:
      HumpbackError: more than `WHOLE_SHARE` of the weights along an axis would be whole.
    """
    _, state = abstract_model(config, "scan")
    for axis, size in mesh.shape.items():
        total = whole = 0
        lengths: set[int] = set()
        for _, leaf in nnx.to_flat_state(state):
            names, shape = leaf.get_metadata("out_sharding"), leaf.shape
            cut = _cut_along(axis, names, shape)
            if cut:
                lengths.update(cut)
                total += leaf.size
                whole += leaf.size * (axis not in partition(names, shape, mesh))
        if whole > WHOLE_SHARE * total:
            factor = math.gcd(size, *lengths)
            raise HumpbackError(
                f"the mesh's {axis}={size} does not divide {WIDTHS[axis]} of "
                f"{' and '.join(map(str, sorted(lengths)))}: {whole / total:.0%} of the weights "
                "that it was to cut would lie whole on every device. Its largest factor that does "
                f"is {factor}: write {axis}={factor}, and leave the other devices to data."
            )


def _cut_along(axis: str, names: Sequence[str | None], shape: Sequence[int]) -> list[int]:
    """Lengths of an array's dimensions that the rules want cut along an axis of the mesh."""
    return [
        length
        for name, length in zip(names, shape, strict=True)
        if name is not None and RULES[name] == axis and name not in MAY_STAY_WHOLE
    ]


def param_shardings(
    config: LlamaConfig,
    mesh: Mesh,
    layout: Layout = "scan",
    lora: LoraSpec | None = None,
    quantize: bool = False,
) -> Params:
    """A NamedSharding for each parameter, in the form of `init_params` or `quantize_params`."""
    _, state = abstract_model(config, layout, lora, quantize)
    units = head_units(config)
    return unflatten(
        {
            path: NamedSharding(
                mesh, partition(leaf.get_metadata("out_sharding"), leaf.shape, mesh, units)
            )
            for path, leaf in nnx.to_flat_state(state)
        }
    )


def abstract_params(
    config: LlamaConfig,
    dtype: str,
    layout: Layout,
    lora: LoraSpec | None = None,
    mesh: Mesh | None = None,
    quantize: bool = False,
) -> Params:
    """Shapes of the parameters, and where they lie; norms, biases and the scales of int8 kernels
    are float32 in any case.
    """
    _, state = abstract_model(config, layout, lora, quantize)
    where = {} if mesh is None else flatten(param_shardings(config, mesh, layout, lora, quantize))

    def kept(path: tuple[Any, ...], leaf: Any) -> str:
        if leaf.dtype == "int8":
            return "int8"
        return "float32" if path[-1] in ("scale", "bias") else dtype

    return unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, kept(path, leaf), sharding=where.get(path))
            for path, leaf in nnx.to_flat_state(state)
        }
    )


def place(params: Params, shardings: Params, convert: Callable[[np.ndarray], np.ndarray]) -> Params:
    """Arrays of the host (or of one device) onto the mesh; no device ever holds a whole one.

    Args:
      convert: applied to each piece on the host, e.g. a cast.
    """
    placed = {}
    where = flatten(shardings)
    for path, leaf in flatten(params).items():

        def piece(index: Any, leaf: Any = leaf) -> np.ndarray:
            return convert(np.asarray(leaf[index]))

        placed[path] = jax.make_array_from_callback(leaf.shape, where[path], piece)
    return unflatten(placed)


def place_int8(
    params: Params,
    config: LlamaConfig,
    mesh: Mesh | None,
    layout: Layout,
    convert: Callable[[np.ndarray], np.ndarray],
) -> Params:
    """What `quantize_params` makes of parameters in this layout, on the mesh or the default device.

    Array by array: beside the result, the devices hold one array as it was.

    Args:
      convert: applied to what stays wide, norms and biases, e.g. a cast.
    """
    before, after = (
        {} if mesh is None else flatten(param_shardings(config, mesh, layout, quantize=quantized))
        for quantized in (False, True)
    )

    def placed(path: tuple[Any, ...], leaf: Any, convert: Callable[[Any], Any]) -> jax.Array:
        if mesh is None:
            return convert(jax.numpy.asarray(leaf))
        found: jax.Array = place({"": leaf}, {"": before[path]}, convert)[""]
        return found

    held: dict[tuple[Any, ...], jax.Array] = {}
    for path, leaf in flatten(params).items():
        axis = QUANTIZED_ALONG.get(path[-1])
        if axis is None:
            held[path] = placed(path, leaf, convert)
            continue
        both = path, (*path[:-1], "scale")
        where = None if mesh is None else tuple(after[name] for name in both)
        narrowed = jax.jit(quantize, static_argnums=1, out_shardings=where)
        # Waited for, lest the next array be there before this one has gone.
        values = jax.block_until_ready(narrowed(placed(path, leaf, lambda piece: piece), axis))
        held |= dict(zip(both, values, strict=True))
    return unflatten(held)


def constrain(x: jax.Array, mesh: Mesh | None, spec: PartitionSpec) -> jax.Array:
    """x inside a program, which XLA is told where to put."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def everywhere(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """The whole array on every device."""
    if mesh is None:
        return jax.numpy.asarray(array)
    where = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback(array.shape, where, array.__getitem__)
