"""What the backward pass of a layer finds kept, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["none", "full", "named", "offload"]
REMATS: tuple[Remat, ...] = ("none", "full", "named", "offload")

# The attention's half of a layer. These five take about 5 D values a token (D: the model's width);
# with them, of a layer's products only the MLP's gate and up are computed again, less than half of
# its forward pass. Their results would take 5 to 7 D more for as many operations a byte.
NAMES = ("q", "k", "v", "context", "attended")


def named(x: jax.Array, name: str) -> jax.Array:
    """x, which `recomputed` may keep; `name` is one of `NAMES`."""
    assert name in NAMES
    return checkpoint_name(x, name)


def recomputed(layer: Callable[..., Any], remat: Remat, *, prevent_cse: bool) -> Callable[..., Any]:
    """`layer`, whose backward pass computes its activations again.

    "full" keeps nothing but the layer's inputs, "named" also what bears one of `NAMES`, and
    "offload" has that in pinned memory of the host meanwhile, copied both ways while the device
    computes. On a CPU that is the same memory.

    Args:
      prevent_cse: not needed inside a scan.
    """
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    policy = None
    if remat == "named":
        policy = policies.save_only_these_names(*NAMES)
    elif remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=(),
            names_which_can_be_offloaded=NAMES,
            offload_src="device",
            offload_dst="pinned_host",
        )
    return nnx.remat(layer, prevent_cse=prevent_cse, policy=policy)
