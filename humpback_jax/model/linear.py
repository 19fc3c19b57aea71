"""Matrix products and the linear layer with its optional low-rank adapter."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from humpback_jax.model.quantize import quantize

Axes = tuple[str | None, ...]


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
    """A low-rank adapter (Hu et al., 2021): W + (alpha / rank) * A B on the named projections."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v")


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
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    batch = tuple(range(x.ndim - 1))
    dx = _dot(gradient, kernel, compute, ((x.ndim - 1,), (1,)))
    dkernel = _dot(x, gradient, compute, (batch, batch))
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def dropout(x: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity without a key, which is how evaluation runs."""
    if key is None or (not isinstance(rate, jax.Array) and rate == 0.0):
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))


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

    def quantize(self) -> None:
        """Makes the kernel int8, a scale for each output; biases and adapters stay as they are."""
        self.kernel, self.scale = quantized(self.kernel, -2)

    def __call__(
        self, x: jax.Array, precision: Precision, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """x: [..., d_in] -> float32 [..., d_out]."""
        y = matmul(x, self.kernel[...], precision.compute)
        if self.scale is not None:
            y = y * self.scale[...]
        if self.use_bias:
            y = y + self.bias[...].astype(jnp.float32)
        if self.lora is not None:
            thin = dropout(x, self.lora.dropout, dropout_key)
            thin = matmul(thin, self.lora_a[...], precision.compute)
            update = matmul(thin, self.lora_b[...], precision.compute)
            y = y + update * (self.lora.alpha / self.lora.rank)
        return y
