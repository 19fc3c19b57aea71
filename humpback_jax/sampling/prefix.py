"""The tokens that all prompts of a job begin with: computed once, seen by every row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from humpback_jax.model.attention import grouped_attention
from humpback_jax.model.blockwise import Shared
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.linear import LoraSpec, Precision
from humpback_jax.model.llama import Cache, Layout, Params, bind
from humpback_jax.parallel.rules import everywhere, head_units, partition

CAPACITY = 512  # places of prefixes, so that all that fit share their programs


class PrefixArrays(NamedTuple):
    """What programs know of the prefix.

    Attributes:
      layers: each layer's `Shared` keys and values: a list ("unrolled") or stacked ("scan").
      seen: bool [V], which tokens it contains.
    """

    layers: Any
    seen: jax.Array


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Tokens that texts may begin with, and their computed keys and values."""

    tokens: tuple[int, ...]
    arrays: PrefixArrays

    def shared_by(self, tokens: np.ndarray) -> int:
        """How many of its tokens a text does not compute again: all, with more to come, or none."""
        count = len(self.tokens)
        begins = len(tokens) > count and tuple(tokens[:count].tolist()) == self.tokens
        return count if begins else 0


def compute_prefix(
    config: LlamaConfig,
    params: Params,
    tokens: Sequence[int],
    precision: Precision,
    layout: Layout = "unrolled",
    lora: LoraSpec | None = None,
    mesh: Mesh | None = None,
) -> Prefix:
    """The prefix of `tokens`, which may be none; on the mesh that holds `params`, if any."""
    seen = np.zeros(config.vocab_size, bool)
    seen[list(tokens)] = True
    capacity = CAPACITY
    while capacity < len(tokens):
        capacity *= 2
    if tokens:
        padded = np.zeros((1, capacity), np.int32)
        padded[0, : len(tokens)] = tokens
        layers = _program(config, precision, layout, lora, mesh)(params, padded)
    else:
        layers = _nothing(config, precision, layout, mesh)()
    return Prefix(tuple(tokens), PrefixArrays(layers, everywhere(seen, mesh)))


def abstract_prefix(config: LlamaConfig, precision: Precision, mesh: Mesh) -> PrefixArrays:
    """The shapes of a prefix on a mesh, layers apart."""
    where = _shardings(config, "unrolled", mesh)
    layers = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(_nothing(config, precision, "unrolled", mesh)),
    )
    return PrefixArrays._make((layers, jax.ShapeDtypeStruct((config.vocab_size,), bool)))


@functools.lru_cache(maxsize=32)
def _nothing(
    config: LlamaConfig, precision: Precision, layout: Layout, mesh: Mesh | None
) -> Callable[[], Any]:
    groups, width, depth = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    leading = (depth,) if layout == "scan" else ()

    def make() -> Any:
        empty = Shared(
            jnp.zeros((*leading, groups, width, CAPACITY), precision.activations),
            jnp.zeros((*leading, groups, CAPACITY, width), precision.activations),
        )
        return empty if layout == "scan" else [empty] * depth

    return jax.jit(make, out_shardings=_shardings(config, layout, mesh))


def _shardings(config: LlamaConfig, layout: Layout, mesh: Mesh | None) -> NamedSharding | None:
    if mesh is None:
        return None
    axes, shape = ("layers", "kv_heads"), (config.num_hidden_layers, config.num_key_value_heads)
    start = 0 if layout == "scan" else 1
    return NamedSharding(mesh, partition(axes[start:], shape[start:], mesh, head_units(config)))


@functools.lru_cache(maxsize=32)
def _program(
    config: LlamaConfig,
    precision: Precision,
    layout: Layout,
    lora: LoraSpec | None,
    mesh: Mesh | None,
) -> Callable[[Params, np.ndarray], Any]:
    def run(params: Params, tokens: jax.Array) -> Any:
        width = tokens.shape[1]
        causal = jnp.tril(jnp.ones((1, width, width), bool))

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: Cache) -> tuple[jax.Array, Cache]:
            shared = Shared(k[0].transpose(1, 2, 0), v[0].transpose(1, 0, 2))
            return grouped_attention(q, k, v, causal, precision), shared

        _, layers = bind(config, params, layout, lora).hidden_states(
            tokens,
            jnp.minimum(jnp.arange(width), config.max_position_embeddings - 1)[None],
            attend,
            None if layout == "scan" else [None] * config.num_hidden_layers,
            precision=precision,
        )
        return layers

    return jax.jit(run, out_shardings=_shardings(config, layout, mesh))
