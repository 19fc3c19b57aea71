"""A shape with random weights against its device: `python -m ...bench.roofline SHAPE BATCHES`.

Decoding is bound by memory: each step reads the weights and the keys and values of all rows once.
Prefill is bound by matrix products.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax
import numpy as np

from humpback_jax.bench.limits import (
    copy_bandwidth,
    matmul_rate,
    prefill_flops,
    square_matmul_rate,
)
from humpback_jax.bench.ours import timed_generation
from humpback_jax.bench.process import peak_bytes
from humpback_jax.compute import Compute, choose_compute, use_compilation_cache
from humpback_jax.errors import HumpbackError
from humpback_jax.model.cache import cache_bytes
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.flops import layer_shapes
from humpback_jax.model.llama import Params, init_params
from humpback_jax.model.shapes import SHAPES
from humpback_jax.sampling.engine import Engine
from humpback_jax.sampling.replicas import Replicas

WINDOW = 512  # places of a slot
PROMPT = 128  # tokens of each prompt
BEFORE, STEPS = 17, 128  # tokens drawn before the steps that are timed, and timed steps
PREFILL_PROMPTS, PREFILL_TOKENS = 64, 256
DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Device:
    """What the device does at best, measured in this process: bytes/s and FLOP/s."""

    bandwidth: float
    products: float

    @classmethod
    def measured(cls, on_cpu: bool) -> Device:
        return cls(
            copy_bandwidth(1 << (27 if on_cpu else 31)),
            square_matmul_rate(512 if on_cpu else 8192, DTYPE),
        )


def measure(shape: str, batches: list[int]) -> dict[str, Any]:
    """Shares of the device's limits: of decoding at each batch size, and of prefill.

    Raises:
      HumpbackError: no such shape.
    """
    if shape not in SHAPES:
        raise HumpbackError(f"{shape}: no such shape; known: {', '.join(SHAPES)}.")
    use_compilation_cache()
    config = dataclasses.replace(SHAPES[shape], max_position_embeddings=WINDOW)
    device = Device.measured(jax.default_backend() == "cpu")
    params = init_params(config, jax.random.key(0), DTYPE, layout="unrolled")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    decode = []
    for batch in batches:
        compute = choose_compute(DTYPE, batch)
        needed = size + cache_bytes(config, batch, WINDOW, compute.precision.activations)
        room = _memory()
        if room and needed > 0.9 * room:
            reason = f"needs {needed / 2**30:.0f} GiB of {room / 2**30:.0f}"
            decode.append({"batch": batch, "skipped": reason})
        else:
            decode.append(_decode(config, params, compute, device))
    return {
        "shape": shape,
        "device": jax.devices()[0].device_kind,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "copy_gbytes_per_s": device.bandwidth / 1e9,
        "matmul_tflops": device.products / 1e12,
        "decode": decode,
        "prefill": _prefill(config, params, choose_compute(DTYPE, min(batches)), device),
        "peak_bytes": peak_bytes(),
    }


def step_bytes(config: LlamaConfig, batch: int, length: float, itemsize: int, cached: int) -> float:
    """Bytes that one step must read: weights of `itemsize`, `length` keys and values a row.

    Args:
      itemsize, cached: bytes of a weight, and of an element of the cache.
    """
    layer = sum(a * b for a, b in layer_shapes(config))
    head = config.hidden_size * config.vocab_size
    weights = (config.num_hidden_layers * layer + head) * itemsize
    width = config.num_key_value_heads * config.head_dim
    return weights + 2.0 * config.num_hidden_layers * batch * length * width * cached


def _decode(
    config: LlamaConfig, params: Params, compute: Compute, device: Device
) -> dict[str, Any]:
    """The cost of a step, as the difference between longer and shorter texts."""
    batch = compute.engine_shape.slots
    alone = _alone(config, params, compute)
    prompts = _prompts(config, batch, PROMPT)
    times = {}
    for new in (BEFORE, BEFORE + STEPS):
        timed_generation(alone, prompts, new)
        times[new] = min(timed_generation(alone, prompts, new)[0] for _ in range(2))
    step = (times[BEFORE + STEPS] - times[BEFORE]) / STEPS
    length = PROMPT + BEFORE + STEPS / 2
    cached = np.dtype(compute.precision.activations).itemsize
    least = step_bytes(config, batch, length, np.dtype(DTYPE).itemsize, cached)
    return {
        "batch": batch,
        "tokens_per_s": batch / step,
        "step_ms": step * 1e3,
        "bytes_per_step": least,
        "bandwidth_share": least / step / device.bandwidth,
    }


def _prefill(
    config: LlamaConfig, params: Params, compute: Compute, device: Device
) -> dict[str, Any]:
    alone = _alone(config, params, compute)
    prompts = _prompts(config, PREFILL_PROMPTS, PREFILL_TOKENS)
    timed_generation(alone, prompts, 1)
    seconds = min(timed_generation(alone, prompts, 1)[0] for _ in range(3))
    rate = PREFILL_PROMPTS * prefill_flops(config, 0, PREFILL_TOKENS) / seconds
    shape = compute.engine_shape
    own_shapes = matmul_rate(config, shape.chunks * shape.chunk_tokens, DTYPE)
    return {
        "tokens_per_s": PREFILL_PROMPTS * PREFILL_TOKENS / seconds,
        "tflops": rate / 1e12,
        "matmul_share": rate / own_shapes,
        "square_matmul_share": rate / device.products,
    }


def _alone(config: LlamaConfig, params: Params, compute: Compute) -> Replicas:
    """One whose stop token no vocabulary has, so that every row draws to the end."""
    stop_ids = (config.vocab_size,)
    engine = Engine(config, params, stop_ids, compute.precision, compute.engine_shape)
    return Replicas([engine])


def _prompts(config: LlamaConfig, count: int, tokens: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    rows: list[list[int]] = generator.integers(config.vocab_size, size=(count, tokens)).tolist()
    return rows


def _memory() -> int:
    """Bytes that programs may use on the device; 0 where it does not say."""
    return int((jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0))


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], [int(batch) for batch in sys.argv[2].split(",")])))
