"""What the machine can do at best, and how much of it a model's work asks for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.flops import layer_shapes

REPEATS = 10  # of each measurement here; the fastest counts


def prefill_flops(config: LlamaConfig, shared: int, own: int, logits: int = 1) -> float:
    """Floating-point operations of reading a text: layers, attention, head.

    2 x the layers' matmul parameters x tokens, 4 x H x K for each key that a query sees, and
    2 x D x V for each place whose logits are wanted.

    Args:
      shared, own: tokens whose keys are there already, and those that are computed.
    """
    depth, width = config.num_hidden_layers, config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    layer = sum(a * b for a, b in layer_shapes(config))
    keys = own * shared + own * (own + 1) / 2
    head = 2.0 * width * config.vocab_size * logits
    return depth * (2.0 * layer * own + 4.0 * heads * keys) + head


def matmul_rate(config: LlamaConfig, rows: int, dtype: str) -> float:
    """FLOP/s of a layer's matrix products alone, at their shapes, the weights not in the cache."""
    shapes, layers = layer_shapes(config), 8
    kernels = [[jnp.ones(shape, dtype) for shape in shapes] for _ in range(layers)]
    inputs = {size: jnp.ones((rows, size), dtype) for size in {shape[0] for shape in shapes}}

    @jax.jit
    def products(kernels: Any, inputs: Any) -> Any:
        return [
            jax.lax.dot(inputs[kernel.shape[0]], kernel, preferred_element_type=jnp.float32)
            for layer in kernels
            for kernel in layer
        ]

    seconds = fastest(lambda: products(kernels, inputs))
    return layers * sum(2.0 * rows * a * b for a, b in shapes) / seconds


def training_matmul_rate(config: LlamaConfig, rows: int, dtype: str) -> float:
    """FLOP/s of a layer's products in training: forward, input gradient and weight gradient.

    Each is as many operations, so that this is the harmonic mean of the three rates.
    """
    shapes = layer_shapes(config)
    kernels = [jnp.ones(shape, dtype) for shape in shapes]
    inputs = [jnp.ones((rows, shape[0]), dtype) for shape in shapes]
    outputs = [jnp.ones((rows, shape[1]), dtype) for shape in shapes]

    def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)

    @jax.jit
    def products(kernels: Any, inputs: Any, outputs: Any) -> Any:
        return [
            (product(x, kernel, (1, 0)), product(y, kernel, (1, 1)), product(x, y, (0, 0)))
            for kernel, x, y in zip(kernels, inputs, outputs, strict=True)
        ]

    seconds = fastest(lambda: products(kernels, inputs, outputs))
    return 3 * sum(2.0 * rows * a * b for a, b in shapes) / seconds


def square_matmul_rate(size: int, dtype: str) -> float:
    """FLOP/s of one product of two square matrices: what the device's makers quote."""
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=jnp.float32))
    return 2.0 * size**3 / fastest(lambda: product(matrix))


def copy_bandwidth(size: int) -> float:
    """Bytes/s, read and written together, of a copy of `size` bytes."""
    array = jnp.ones(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2.0 * array.nbytes / fastest(lambda: copy(array))


def fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of `REPEATS` calls, after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
    return min(times)
