"""Low-rank adapters as a separate tree: split off, joined for the forward pass, merged for good."""

from __future__ import annotations

import jax.numpy as jnp

from humpback_jax.errors import HumpbackError
from humpback_jax.model.linear import LoraSpec
from humpback_jax.model.llama import Params, flatten, unflatten

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
ADAPTER_LEAVES = ("lora_a", "lora_b")


def lora_spec(rank: int, alpha: float, dropout: float, targets: tuple[str, ...]) -> LoraSpec:
    """Checks the names and returns the adapter's spec; accepts "q" and "q_proj" alike.

    Raises:
      HumpbackError: an unknown target module, or a rank below 1.
    """
    names = tuple(name.removesuffix("_proj") for name in targets)
    unknown = sorted(set(names) - set(PROJECTIONS))
    if unknown or not names:
        raise HumpbackError(
            f"LoRA targets {list(targets)} are not all known; choose from {', '.join(PROJECTIONS)}."
        )
    if rank < 1:
        raise HumpbackError(f"LoRA rank {rank} must be at least 1.")
    return LoraSpec(rank, alpha, dropout, tuple(sorted(names, key=PROJECTIONS.index)))


def split_adapter(params: Params) -> tuple[Params, Params]:
    """(base parameters, adapter parameters)."""
    flat = flatten(params)
    base = {path: leaf for path, leaf in flat.items() if path[-1] not in ADAPTER_LEAVES}
    adapter = {path: leaf for path, leaf in flat.items() if path[-1] in ADAPTER_LEAVES}
    return unflatten(base), unflatten(adapter)


def join(base: Params, adapter: Params) -> Params:
    """One tree of both; an empty `base` returns `adapter` itself (full tuning)."""
    return unflatten({**flatten(base), **flatten(adapter)})


def merge_adapter(base: Params, adapter: Params, spec: LoraSpec) -> Params:
    """W + (alpha / rank) A B in float32, in each kernel's own dtype; works on both layouts."""
    flat, low_rank = flatten(base), flatten(adapter)
    for path, a in low_rank.items():
        if path[-1] == "lora_a":
            b = low_rank[(*path[:-1], "lora_b")]
            kernel = flat[(*path[:-1], "kernel")]
            update = jnp.matmul(a, b, precision="highest") * (spec.alpha / spec.rank)
            merged = jnp.asarray(kernel, jnp.float32) + update
            flat[(*path[:-1], "kernel")] = merged.astype(kernel.dtype)
    return unflatten(flat)
