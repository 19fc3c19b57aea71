"""The LLaMA decoder (Touvron et al., 2023) as a Flax NNX module.

One module serves training, prefill, decoding and scoring: what differs between them is only how
the queries attend, so `Llama.hidden_states` takes that as a function (`model/attention.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.linear import (
    Linear,
    LoraSpec,
    Precision,
    dropout,
    folded,
    matmul,
    quantized,
)
from humpback_jax.model.quantize import QUANTIZED_ALONG, quantize
from humpback_jax.model.remat import Remat, named, recomputed
from humpback_jax.model.rope import apply_rope, rope_tables

Params = dict[str, Any]
Layout = Literal["scan", "unrolled"]
Cache = Any
# (table, tokens [B, T]) -> [B, T, D], where the table is a function of the tokens
LookUp = Callable[[Callable[[jax.Array], jax.Array], jax.Array], jax.Array]
# (q [B,T,H,K], k [B,T,G,K], v [B,T,G,K], this layer's cache) -> (context [B,T,H,K], its new cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, width: int, epsilon: float, dtype: str) -> None:
        self.scale = nnx.Param(
            jnp.ones((width,), dtype), out_sharding=("embed",), eager_sharding=False
        )
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        # Flat, because XLA's CPU backend sums a [1, T, D] of the backward pass at a tenth of the
        # speed of a [T, D].
        wide = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normal = wide * jax.lax.rsqrt(variance + self.epsilon)
        scaled = normal * self.scale[...].astype(jnp.float32)
        return scaled.reshape(x.shape).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention: H query heads share G key/value heads of width K."""

    def __init__(
        self, config: LlamaConfig, dtype: str, lora: LoraSpec | None, rngs: nnx.Rngs
    ) -> None:
        heads, groups, width = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.head_shape, self.group_shape = (heads, width), (groups, width)

        def linear(name: str, d_in: int, d_out: int, axes: tuple[str, str]) -> Linear:
            return Linear(
                d_in,
                d_out,
                axes,
                use_bias=config.attention_bias,
                dtype=dtype,
                lora=lora if lora and name in lora.targets else None,
                rngs=rngs,
            )

        self.q = linear("q", config.hidden_size, heads * width, ("embed", "heads"))
        self.k = linear("k", config.hidden_size, groups * width, ("embed", "kv_heads"))
        self.v = linear("v", config.hidden_size, groups * width, ("embed", "kv_heads"))
        self.o = linear("o", heads * width, config.hidden_size, ("heads", "embed"))

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        attend: Attend,
        cache: Cache,
        precision: Precision,
        keys: Sequence[jax.Array | None],
    ) -> tuple[jax.Array, Cache]:
        kept = precision.activations
        leading = x.shape[:-1]

        def projected(linear: Linear, shape: tuple[int, int], key: jax.Array | None) -> jax.Array:
            y = linear(x, precision, key)
            if cache is not None:
                # Else XLA for TPU wants the kernels of a divided model transposed, and each call
                # of decoding begins with a copy of them.
                y = jax.lax.optimization_barrier(y)
            return y.reshape(*leading, *shape)

        q = projected(self.q, self.head_shape, keys[0])
        k = projected(self.k, self.group_shape, keys[1])
        v = projected(self.v, self.group_shape, keys[2])
        q = named(apply_rope(q, *rope).astype(kept), "q")
        k = named(apply_rope(k, *rope).astype(kept), "k")
        context, cache = attend(q, k, named(v.astype(kept), "v"), cache)
        return self.o(context.reshape(*leading, -1), precision, keys[3]), cache


class MLP(nnx.Module):
    """SwiGLU feed-forward (Shazeer, 2020): down(silu(gate(x)) * up(x))."""

    def __init__(
        self, config: LlamaConfig, dtype: str, lora: LoraSpec | None, rngs: nnx.Rngs
    ) -> None:
        def linear(name: str, d_in: int, d_out: int, axes: tuple[str, str]) -> Linear:
            return Linear(
                d_in,
                d_out,
                axes,
                use_bias=config.mlp_bias,
                dtype=dtype,
                lora=lora if lora and name in lora.targets else None,
                rngs=rngs,
            )

        inner, outer = config.intermediate_size, config.hidden_size
        self.gate = linear("gate", outer, inner, ("embed", "mlp"))
        self.up = linear("up", outer, inner, ("embed", "mlp"))
        self.down = linear("down", inner, outer, ("mlp", "embed"))

    def __call__(
        self, x: jax.Array, precision: Precision, keys: Sequence[jax.Array | None]
    ) -> jax.Array:
        gate = self.gate(x, precision, keys[0])
        inner = (jax.nn.silu(gate) * self.up(x, precision, keys[1])).astype(precision.activations)
        return self.down(inner, precision, keys[2])


class Block(nnx.Module):
    """One decoder layer: pre-norm attention and MLP, each with residual dropout in training."""

    def __init__(
        self, config: LlamaConfig, dtype: str, lora: LoraSpec | None, rngs: nnx.Rngs
    ) -> None:
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attn = Attention(config, dtype, lora, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, lora, rngs)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        attend: Attend,
        cache: Cache,
        precision: Precision,
        dropout_rate: float | jax.Array,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Cache]:
        keys: list[jax.Array | None] = [None] * 9
        if key is not None:
            keys = [folded(key, site) for site in range(9)]
        update, cache = self.attn(self.attn_norm(x), rope, attend, cache, precision, keys[0:4])
        x = named(x + dropout(update, dropout_rate, keys[4]).astype(x.dtype), "attended")
        update = self.mlp(self.mlp_norm(x), precision, keys[5:8])
        return x + dropout(update, dropout_rate, keys[8]).astype(x.dtype), cache


class Llama(nnx.Module):
    """Decoder-only LLaMA.

    Layers are built with `nnx.vmap` and applied with `lax.scan` (layout "scan"), or kept apart and
    applied in a Python loop (layout "unrolled"), which decoding and CPU training need: slicing
    stacked weights inside a loop copies them, and XLA's CPU backend runs a scanned gradient at a
    fraction of the speed.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        layout: Layout = "scan",
        lora: LoraSpec | None = None,
    ) -> None:
        self.config = config
        table = nnx.initializers.normal(0.02)(
            rngs.params(), (config.vocab_size, config.hidden_size), dtype
        )
        self.embed = Embedding(table)
        depth = config.num_hidden_layers
        if layout == "scan":

            @functools.partial(
                nnx.vmap, axis_size=depth, transform_metadata={nnx.PARTITION_NAME: "layers"}
            )
            def stacked(rngs: nnx.Rngs) -> Block:
                return Block(config, dtype, lora, rngs)

            self.layers: Any = stacked(rngs.split(depth))
        else:
            self.layers = nnx.List([Block(config, dtype, lora, rngs) for _ in range(depth)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size,
                config.vocab_size,
                ("embed", "vocab"),
                use_bias=False,
                dtype=dtype,
                lora=None,
                rngs=rngs,
            )

    def hidden_states(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        caches: Any = None,
        *,
        precision: Precision,
        dropout_rate: float | jax.Array = 0.0,
        dropout_keys: jax.Array | None = None,
        remat: Remat = "none",
        placed: Callable[[jax.Array], jax.Array] = lambda x: x,
        look_up: LookUp = lambda table, tokens: table(tokens),
        embedded: Callable[[jax.Array], jax.Array] = lambda x: x,
    ) -> tuple[jax.Array, Any]:
        """Runs the decoder up to the final norm.

        Args:
          tokens, positions: int32 [B, T].
          attend: how queries meet keys; see `model/attention.py`.
          caches: one cache per layer: a list (unrolled) or a tree stacked on axis 0 (scan); None
            when `attend` keeps none.
          dropout_rate: of all layers, or [layers] of each.
          dropout_keys: [B, T], each token's; None switches dropout off.
          remat: what the backward pass finds kept of each layer; see `model/remat.py`.
          placed: tells XLA where [B, T, D] between the layers lies.
          look_up: takes the table, and tokens to embeddings [B, T, D] where it wants them.
          embedded: what becomes of the embeddings [B, T, D] before the first layer.

        Returns:
          hidden [B, T, D] in `precision.activations`, and the new caches in the form given.
        """
        rope = rope_tables(self.config, positions)
        x = placed(embedded(look_up(self.embed, tokens).astype(precision.activations)))

        def run(
            block: Block,
            x: jax.Array,
            cache: Cache,
            key: jax.Array | None,
            rate: jax.Array | None,
        ) -> tuple[jax.Array, Cache]:
            thinned = dropout_rate if rate is None else rate
            x, cache = block(x, rope, attend, cache, precision, thinned, key)
            return placed(x), cache

        run = recomputed(run, remat, prevent_cse=not isinstance(self.layers, Block))
        depth = self.config.num_hidden_layers
        keys = None
        if dropout_keys is not None:
            keys = jax.vmap(functools.partial(folded, dropout_keys))(jnp.arange(depth))
        rates = dropout_rate if isinstance(dropout_rate, jax.Array) else None
        if isinstance(self.layers, Block):
            graphdef, state = nnx.split(self.layers)

            def body(x: jax.Array, per_layer: Any) -> tuple[jax.Array, Cache]:
                layer, *others = per_layer
                return run(nnx.merge(graphdef, layer), x, *others)

            x, caches = jax.lax.scan(body, x, (state, caches, keys, rates))
        else:
            # All layers are one function to trace, and differ in what it is called with.
            graphdef, _ = nnx.split(self.layers[0])

            @jax.jit
            def layer(state: Any, x: jax.Array, *others: Any) -> tuple[jax.Array, Cache]:
                return run(nnx.merge(graphdef, state), x, *others)

            updated = []
            for index, block in enumerate(self.layers):
                others = (None if per is None else per[index] for per in (caches, keys, rates))
                x, cache = layer(nnx.state(block), x, *others)
                updated.append(cache)
            caches = None if caches is None else updated
        return self.norm(x), caches

    def quantize(self) -> None:
        """Makes all kernels and the embeddings int8, which `quantize_params` is for."""
        for _, module in list(nnx.iter_modules(self)):
            if isinstance(module, Linear | Embedding):
                module.quantize()

    def logits(self, hidden: jax.Array, precision: Precision) -> jax.Array:
        """hidden [..., D] -> float32 [..., V]."""
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden, precision)
        logits = matmul(hidden, self.embed.embedding[...].T, precision.compute)
        return logits if self.embed.scale is None else logits * self.embed.scale[...]

    def some_logits(
        self, hidden: jax.Array, first: jax.Array, count: int, precision: Precision
    ) -> jax.Array:
        """hidden [..., D] -> float32 [..., count]: the logits of the tokens from `first` on."""
        if count == self.config.vocab_size:
            return self.logits(hidden, precision)
        head: Embedding | Linear
        if self.config.tie_word_embeddings:
            head = self.embed
            kernel = jax.lax.dynamic_slice_in_dim(head.embedding[...], first, count, 0).T
        else:
            head = self.lm_head
            kernel = jax.lax.dynamic_slice_in_dim(head.kernel[...], first, count, 1)
        logits = matmul(hidden, kernel, precision.compute)
        if head.scale is None:
            return logits
        return logits * jax.lax.dynamic_slice_in_dim(head.scale[...], first, count)


class Embedding(nnx.Module):
    """Token embeddings [V, D]; also the output projection where the model ties them.

    A quantised table is int8 and has a scale [V].
    """

    def __init__(self, table: jax.Array) -> None:
        self.embedding = nnx.Param(table, out_sharding=("vocab", "embed"), eager_sharding=False)
        self.scale: nnx.Param | None = nnx.data(None)

    def quantize(self) -> None:
        """Makes the table int8, a scale for each token."""
        self.embedding, self.scale = quantized(self.embedding, QUANTIZED_ALONG["embedding"])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        rows = jnp.take(self.embedding[...], tokens, axis=0)
        if self.scale is None:
            return rows
        return rows * jnp.take(self.scale[...], tokens)[..., None]


@functools.lru_cache(maxsize=32)
def abstract_model(
    config: LlamaConfig,
    layout: Layout = "scan",
    lora: LoraSpec | None = None,
    quantize: bool = False,
) -> tuple[Any, Any]:
    """Graph definition and abstract state (shapes, dtypes, logical axes); allocates nothing."""

    def build() -> Llama:
        model = Llama(config, rngs=nnx.Rngs(0), layout=layout, lora=lora)
        if quantize:
            model.quantize()
        return model

    return nnx.split(nnx.eval_shape(build))


def count_parameters(config: LlamaConfig) -> int:
    """Of a model without adapters; a tied head counts once."""
    _, state = abstract_model(config)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def bind(
    config: LlamaConfig, params: Params, layout: Layout = "scan", lora: LoraSpec | None = None
) -> Llama:
    """The module that holds `params` (a nested dict of arrays, dtypes as given).

    Args:
      params: of the model, or of the model quantised (`quantize_params`).

    Raises:
      HumpbackError: `params` is not the tree of this model.
    """
    given = flatten(params)
    graphdef, state = abstract_model(config, layout, lora, ("embed", "scale") in given)
    flat = dict(nnx.to_flat_state(state))
    _check_tree({path: leaf.shape for path, leaf in flat.items()}, given)
    leaves = {path: variable.replace(given[path]) for path, variable in flat.items()}
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def _check_tree(shapes: dict[tuple[Any, ...], tuple[int, ...]], given: dict[Any, Any]) -> None:
    missing, unknown = shapes.keys() - given.keys(), given.keys() - shapes.keys()
    if missing or unknown:
        raise HumpbackError(
            f"the parameters do not fit the model: missing {_names(missing)}, "
            f"unknown {_names(unknown)}."
        )
    misshaped = {path for path, shape in shapes.items() if given[path].shape != shape}
    if misshaped:
        raise HumpbackError(f"parameters of the wrong shape for the model: {_names(misshaped)}.")


def _names(paths: set[tuple[Any, ...]]) -> str:
    return ", ".join(sorted(".".join(map(str, path)) for path in paths)) or "none"


def quantize_params(params: Params) -> Params:
    """Kernels and embeddings in int8, with their scales; all else, adapters too, as it is.

    For sampling and scoring alone: nothing can be trained, merged or exported afterwards.

    Args:
      params: of either layout; a part of a model's will do.
    """
    flat = {}
    for path, leaf in flatten(params).items():
        if path[-1] in QUANTIZED_ALONG:
            leaf, flat[*path[:-1], "scale"] = quantize(leaf, QUANTIZED_ALONG[path[-1]])
        flat[path] = leaf
    return unflatten(flat)


def init_params(
    config: LlamaConfig,
    key: jax.Array,
    dtype: str = "float32",
    layout: Layout = "scan",
    lora: LoraSpec | None = None,
) -> Params:
    """Freshly initialised parameters as a nested dict."""
    model = Llama(config, rngs=nnx.Rngs(key), dtype=dtype, layout=layout, lora=lora)
    return nnx.to_pure_dict(nnx.state(model))


def flatten(params: Params, prefix: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Nested dict -> {path: leaf}, in sorted order of paths."""
    flat: dict[tuple[Any, ...], Any] = {}
    for name in sorted(params, key=str):
        value = params[name]
        if isinstance(value, dict):
            flat.update(flatten(value, (*prefix, name)))
        else:
            flat[(*prefix, name)] = value
    return flat


def unflatten(flat: dict[tuple[Any, ...], Any]) -> Params:
    """The inverse of `flatten`."""
    params: Params = {}
    for path, leaf in flat.items():
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return params


def _slices(leaf: Any) -> list[Any]:
    return [leaf[index] for index in range(leaf.shape[0])]


def unstack_layers(params: Params, split: Callable[[Any], list[Any]] = _slices) -> Params:
    """Layout "scan" -> "unrolled": layers.X [L, ...] becomes layers.i.X [...] for each layer i.

    `split` makes the leaves of all layers of one.
    """
    flat: dict[tuple[Any, ...], Any] = {}
    for path, leaf in flatten(params).items():
        if path[0] == "layers":
            for index, own in enumerate(split(leaf)):
                flat["layers", index, *path[1:]] = own
        else:
            flat[path] = leaf
    return unflatten(flat)


def stack_layers(params: Params, stack: Callable[[list[Any]], Any] = jnp.stack) -> Params:
    """The inverse of `unstack_layers`; `stack` makes one leaf of those of all layers."""
    flat: dict[tuple[Any, ...], Any] = {}
    grouped: dict[tuple[Any, ...], dict[int, Any]] = {}
    for path, leaf in flatten(params).items():
        if path[0] == "layers":
            grouped.setdefault(path[2:], {})[path[1]] = leaf
        else:
            flat[path] = leaf
    for path, by_layer in grouped.items():
        flat["layers", *path] = stack([by_layer[index] for index in sorted(by_layer)])
    return unflatten(flat)
