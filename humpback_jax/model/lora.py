"""Low-rank adapters as a separate tree: split off, joined for the forward pass, merged for good."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.linear import LoraSpec
from humpback_jax.model.llama import Params, abstract_model, flatten, unflatten

Array = jax.Array | np.ndarray
Module = dict[str, Any]  # the arrays of one adapted projection

# Name of a projection -> the path that patterns are matched with.
PATHS = {
    **{name: f"attn.{name}" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}" for name in ("gate", "up", "down")},
}
PROJECTIONS = tuple(PATHS)
ADAPTER_LEAVES = ("lora_a", "lora_b", "lora_magnitude")
NORM = "lora_norm"  # of V = W + scale * A B at merging, without which DoRA cannot be undone


def lora_spec(
    rank: int,
    alpha: float,
    dropout: float,
    targets: tuple[str, ...],
    scaling: Literal["lora", "rslora"] = "lora",
    dora: bool = False,
    base: Literal["auto", "int8"] = "auto",
) -> LoraSpec:
    """Checks the names and returns the adapter's spec.

    Args:
      targets: projections by name ("q" or "q_proj"), "all", or patterns like "attn.*" and "mlp.*".

    Raises:
      HumpbackError: a target that matches no projection, or a rank below 1.
    """
    if rank < 1:
        raise HumpbackError(f"LoRA rank {rank} must be at least 1.")
    if not targets:
        raise HumpbackError(f"LoRA needs targets: {_known()}.")
    matched = {target: _matching(target) for target in targets}
    unknown = [target for target, found in matched.items() if not found]
    if unknown:
        listed = ", ".join(map(repr, unknown))
        raise HumpbackError(f"LoRA targets that match no projection: {listed}. Known: {_known()}.")
    chosen = set().union(*matched.values())
    ordered = tuple(name for name in PROJECTIONS if name in chosen)
    return LoraSpec(rank, alpha, dropout, ordered, scaling, dora, base)


def _matching(target: str) -> set[str]:
    pattern = "*" if target == "all" else target.removesuffix("_proj")
    return {
        name
        for name, path in PATHS.items()
        if name == pattern or fnmatch.fnmatchcase(path, pattern)
    }


def _known() -> str:
    return f"{', '.join(PROJECTIONS)}, all, or patterns of {', '.join(PATHS.values())}"


def split_adapter(params: Params) -> tuple[Params, Params]:
    """(base parameters, adapter parameters)."""
    flat = flatten(params)
    base = {path: leaf for path, leaf in flat.items() if path[-1] not in ADAPTER_LEAVES}
    adapter = {path: leaf for path, leaf in flat.items() if path[-1] in ADAPTER_LEAVES}
    return unflatten(base), unflatten(adapter)


def join(base: Params, adapter: Params) -> Params:
    """One tree of both; an empty `base` returns `adapter` itself (full tuning)."""
    return unflatten({**flatten(base), **flatten(adapter)})


def adapter_shapes(config: LlamaConfig, spec: LoraSpec) -> dict[tuple[Any, ...], tuple[int, ...]]:
    """Path -> shape of each leaf of a stacked adapter."""
    _, state = abstract_model(config, "scan", spec)
    return {
        path: leaf.shape for path, leaf in nnx.to_flat_state(state) if path[-1] in ADAPTER_LEAVES
    }


def with_magnitudes(adapter: Params, base: Params) -> Params:
    """A fresh DoRA adapter with the magnitudes of `base`, which it thereby leaves as it is.

    Args:
      adapter: A B is zero. base: as it is, or quantised; both in the same layout.
    """
    flat, frozen = flatten(adapter), flatten(base)
    for path in flat:
        if path[-1] == "lora_magnitude":
            norm = _norm(frozen[(*path[:-1], "kernel")])
            flat[path] = norm * frozen.get((*path[:-1], "scale"), 1.0)
    return unflatten(flat)


def merge_adapter(base: Params, adapter: Params, spec: LoraSpec) -> Params:
    """The adapted weights, computed in float32, in each kernel's own dtype; for both layouts.

    As `with_norms` and `unmerge_adapter`, it works on the host (see `_by_layer`).
    """

    def merged(kernel: Array, module: Module) -> Array:
        adapted = kernel + _update(module, spec)
        if spec.dora:
            adapted = adapted * (module["lora_magnitude"] / _norm(adapted))[..., None, :]
        return adapted

    return _with_kernels(base, adapter, merged)


def with_norms(base: Params, adapter: Params, spec: LoraSpec) -> Params:
    """The adapter with what `unmerge_adapter` needs beside it: for DoRA, each output's norm."""

    def norm(kernel: Array, module: Module) -> Array:
        return _norm(kernel + _update(module, spec))

    flat, frozen = flatten(adapter), flatten(base)
    for path, module in _modules(adapter) if spec.dora else ():
        flat[(*path, NORM)] = _by_layer(norm, frozen[(*path, "kernel")], module, np.float32)
    return unflatten(flat)


def unmerge_adapter(params: Params, adapter: Params, spec: LoraSpec) -> Params:
    """The base again, within rounding: the inverse of `merge_adapter`.

    Args:
      adapter: as `with_norms` returned it.
    """

    def unmerged(kernel: Array, module: Module) -> Array:
        if spec.dora:
            kernel = kernel * (module[NORM] / module["lora_magnitude"])[..., None, :]
        return kernel - _update(module, spec)

    return _with_kernels(params, adapter, unmerged)


def _modules(adapter: Params) -> Iterator[tuple[tuple[Any, ...], Module]]:
    """(path, leaves by name) of each adapted projection."""
    grouped: dict[tuple[Any, ...], Module] = {}
    for path, leaf in flatten(adapter).items():
        grouped.setdefault(path[:-1], {})[path[-1]] = leaf
    yield from grouped.items()


def _with_kernels(
    params: Params, adapter: Params, change: Callable[[Array, Module], Array]
) -> Params:
    """`params` with a change to each adapted kernel, made in float32."""
    flat = flatten(params)
    for path, module in _modules(adapter):
        kernel = flat[(*path, "kernel")]
        flat[(*path, "kernel")] = _by_layer(change, kernel, module, kernel.dtype)
    return unflatten(flat)


def _by_layer(
    change: Callable[[Array, Module], Array], kernel: Any, module: Module, dtype: Any
) -> Array:
    """What `change` makes of a kernel [..., d_in, d_out] in float32 and its module, as `dtype`.

    Of stacked layers one after another: beside the result, nothing of its size is made. On the
    host, or on the devices where other processes hold parts of it.
    """
    leaves = (kernel, *module.values())
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves):
        return _by_layer_on_devices(change, kernel, module, dtype)
    if len(kernel.shape) == 2:
        wide = np.asarray(kernel).astype(np.float32)
        return change(wide, {name: np.asarray(leaf) for name, leaf in module.items()}).astype(dtype)
    changed: np.ndarray | None = None
    for layer in range(kernel.shape[0]):
        own = {name: leaf[layer] for name, leaf in module.items()}
        one = _by_layer(change, kernel[layer], own, dtype)
        if changed is None:
            changed = np.empty((kernel.shape[0], *one.shape), dtype)
        changed[layer] = one
    assert changed is not None
    return changed


def _by_layer_on_devices(
    change: Callable[[Array, Module], Array], kernel: jax.Array, module: Module, dtype: Any
) -> jax.Array:
    def changed(kernel: jax.Array, module: Module) -> jax.Array:
        if kernel.ndim == 2:
            return jnp.asarray(change(kernel.astype(jnp.float32), module), dtype)
        return jax.lax.map(lambda layer: changed(*layer), (kernel, module))

    same = jax.eval_shape(changed, kernel, module).shape == kernel.shape
    return jax.jit(changed, out_shardings=kernel.sharding if same else None)(kernel, module)


def _update(module: Module, spec: LoraSpec) -> Array:
    a, b = module["lora_a"], module["lora_b"]
    if isinstance(a, np.ndarray):
        return np.matmul(a, b) * np.float32(spec.scale)
    return jnp.matmul(a, b, precision="highest") * spec.scale


def _norm(kernel: Array) -> Array:
    """Of each output: [..., d_in, d_out] -> float32 [..., d_out]."""
    if isinstance(kernel, np.ndarray):
        return np.sqrt(np.square(kernel).sum(-2, dtype=np.float64)).astype(np.float32)
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)
