"""Matrix products and the linear layer with its optional low-rank adapter."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from humpback_jax.model.quantize import QUANTIZED_ALONG, quantize

Axes = tuple[str | None, ...]
NARROW = 8  # times as many inputs as outputs: a low-rank adapter's first matrix


@dataclasses.dataclass(frozen=True)
class Precision:
    """Number formats of a forward pass; parameters keep their own.

    Attributes:
      compute: dtype of the matrix products' inputs. Every product accumulates in, and returns,
        float32: with bfloat16 inputs this is the fast form on TPU, GPU and AVX-512-BF16 CPUs.
      activations: dtype of what is kept between the products.
      kv: dtype of the keys and values that decoding keeps: "int8"; None for that of activations.
    """

    compute: str = "float32"
    activations: str = "float32"
    kv: str | None = None


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """A low-rank adapter (Hu et al., 2021): V = W + scale * A B on the named projections.

    Attributes:
      scaling: "lora", scale = alpha / rank; "rslora", alpha / sqrt(rank) (Kalajdzievski, 2023).
      dora: each output's weights are V's, scaled to a trained magnitude (Liu et al., 2024).
      base: the frozen weights' format while the adapter trains: "int8"; "auto" is float32.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v")
    scaling: Literal["lora", "rslora"] = "lora"
    dora: bool = False
    base: Literal["auto", "int8"] = "auto"

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.scaling == "rslora" else self.rank)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: jax.Array, compute: str) -> jax.Array:
    """x @ kernel with inputs in `compute` and a float32 result.

    Args:
      x: [..., d_in]; kernel: [d_in, d_out].

    The backward products take their inputs in `compute` too; autodiff alone would run them in
    float32, at half of the speed, because the incoming gradient is float32.
    """
    return _dot(x, kernel, compute, ((x.ndim - 1,), (0,)))


def _dot(
    a: jax.Array, b: jax.Array, compute: str, contract: tuple[tuple[int, ...], tuple[int, ...]]
) -> jax.Array:
    return jax.lax.dot_general(
        a.astype(compute), b.astype(compute), (contract, ((), ())), preferred_element_type="float32"
    )


def _matmul_forward(
    x: jax.Array, kernel: jax.Array, compute: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(x, kernel, compute), (x, kernel)


def _matmul_backward(
    compute: str, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    x, kernel = saved
    batch = tuple(range(x.ndim - 1))
    dx = _dot(gradient, kernel, compute, ((x.ndim - 1,), (1,)))
    if kernel.dtype == jnp.int8:  # whole numbers have no gradient
        return dx.astype(x.dtype), None
    if kernel.shape[0] > NARROW * kernel.shape[1]:
        # As x^T gradient, XLA's CPU backend takes a narrow result at a third of the speed; the
        # barrier keeps it from turning the product around again.
        turned = jax.lax.optimization_barrier(_dot(gradient, x, compute, (batch, batch)))
        dkernel = turned.T
    else:
        dkernel = _dot(x, gradient, compute, (batch, batch))
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def dropout(x: jax.Array, rate: float | jax.Array, keys: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity without keys, which is how evaluation runs.

    Args:
      x: [B, T, D]. keys: [B, T], each token's, so that noise does not depend on where it lies.
    """
    if keys is None or (not isinstance(rate, jax.Array) and rate == 0.0):
        return x

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, 1.0 - rate, x.shape[-1:])

    kept = jax.vmap(jax.vmap(draw))(keys)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))


def folded(keys: jax.Array, number: int | jax.Array) -> jax.Array:
    """Keys [B, T] -> [B, T], for another purpose of the same tokens."""
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, number)))(keys)


def quantized(weights: nnx.Param, axis: int) -> tuple[nnx.Param, nnx.Param]:
    """int8 weights and float32 scales for each of them along `axis`, with their logical axes."""
    values, scale = quantize(weights[...], axis)
    axes = weights.get_metadata("out_sharding")
    kept = list(axes)
    del kept[axis]
    return (
        nnx.Param(values, out_sharding=axes, eager_sharding=False),
        nnx.Param(scale, out_sharding=tuple(kept), eager_sharding=False),
    )


class Linear(nnx.Module):
    """y = x W (+ b) (+ the adapter's term). Kernel [d_in, d_out], declared with logical axes.

    A quantised kernel is int8 and has a scale [d_out], which multiplies the float32 product: the
    products read one byte a weight, and no wider copy of it need exist.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        axes: Axes,
        *,
        use_bias: bool,
        dtype: str,
        lora: LoraSpec | None,
        rngs: nnx.Rngs,
    ) -> None:
        scale = nnx.initializers.normal(d_in**-0.5)
        self.kernel = nnx.Param(
            scale(rngs.params(), (d_in, d_out), dtype), out_sharding=axes, eager_sharding=False
        )
        if use_bias:
            self.bias = nnx.Param(
                jnp.zeros((d_out,), dtype), out_sharding=axes[1:], eager_sharding=False
            )
        self.scale: nnx.Param | None = nnx.data(None)
        self.use_bias = use_bias
        self.lora = lora
        if lora is not None:
            # uniform within 1 / sqrt(d_in), as peft does
            uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            down = uniform(rngs.params(), (d_in, lora.rank), "float32")
            up = jnp.zeros((lora.rank, d_out), "float32")
            self.lora_a = nnx.LoRAParam(
                down, out_sharding=(axes[0], "lora_rank"), eager_sharding=False
            )
            self.lora_b = nnx.LoRAParam(
                up, out_sharding=("lora_rank", axes[1]), eager_sharding=False
            )
            if lora.dora:
                self.lora_magnitude = nnx.LoRAParam(
                    jnp.ones((d_out,), "float32"), out_sharding=axes[1:], eager_sharding=False
                )

    def quantize(self) -> None:
        """Makes the kernel int8, a scale for each output; biases and adapters stay as they are."""
        self.kernel, self.scale = quantized(self.kernel, QUANTIZED_ALONG["kernel"])

    def __call__(
        self, x: jax.Array, precision: Precision, dropout_keys: jax.Array | None = None
    ) -> jax.Array:
        """x: [..., d_in] -> float32 [..., d_out]."""
        y = matmul(x, self.kernel[...], precision.compute)
        if self.scale is not None:
            y = y * self.scale[...]
        if self.lora is not None:
            thin = dropout(x, self.lora.dropout, dropout_keys)
            thin = matmul(thin, self.lora_a[...], precision.compute)
            update = matmul(thin, self.lora_b[...], precision.compute)
            y = y + update * self.lora.scale
            if self.lora.dora:
                norm = self._adapted_norm(self.lora.scale, precision)
                y = y * (self.lora_magnitude[...] / norm)
        if self.use_bias:
            y = y + self.bias[...].astype(jnp.float32)
        return y

    def _adapted_norm(self, factor: float, precision: Precision) -> jax.Array:
        """||W + factor * A B|| of each output, float32 [d_out]; neither A B nor the sum is made.

        Gradients take it for a constant, which the paper (section 4.3) found to cost no quality.
        """
        kernel, a, b = map(
            jax.lax.stop_gradient, (self.kernel[...], self.lora_a[...], self.lora_b[...])
        )
        squares = jnp.square(kernel.astype(jnp.float32)).sum(0)
        thin = matmul(a.T, kernel, precision.compute)
        if self.scale is not None:
            squares, thin = squares * jnp.square(self.scale[...]), thin * self.scale[...]
        inner = matmul(matmul(a.T, a, precision.compute), b, precision.compute)
        squares = squares + (b * (2 * factor * thin + factor**2 * inner)).sum(0)
        return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))
