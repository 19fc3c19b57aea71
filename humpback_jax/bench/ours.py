"""Our own measurement, in a process of its own: `python -m humpback_jax.bench.ours WORKLOAD`."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from humpback_jax.bench.workload import Workload
from humpback_jax.compute import choose_compute, use_compilation_cache
from humpback_jax.inference import Inference
from humpback_jax.model.config import LlamaConfig
from humpback_jax.models import load_model
from humpback_jax.sampling.engine import Completion, Engine, Request, Work
from humpback_jax.sampling.prefix import Prefix
from humpback_jax.sampling.sampler import Decoding, record_key


def measure(workload: Workload, slots: int) -> dict[str, Any]:
    """Rates of greedy generation, and of its prefill alone, after everything is compiled."""
    use_compilation_cache()
    before = _peak_bytes()
    started = time.perf_counter()
    model = load_model(workload.model)
    compute = choose_compute(workload.precision, slots)
    reader = Inference(model, compute)
    engine = reader.engine
    prefix = reader.prefix(workload.prompts[0][: workload.shared])
    # The longest prompts decide how long the slots are, and with it the programs.
    longest = sorted(workload.prompts, key=len)[-2:]
    _timed(engine, longest, workload.max_new_tokens, prefix)
    ready = time.perf_counter() - started
    seconds, done, work = _timed(engine, workload.prompts, workload.max_new_tokens, prefix)
    prefill_seconds, _, prefill = _timed(engine, workload.prompts, 1, prefix)
    chunk = compute.engine_shape.chunks * compute.engine_shape.chunk_tokens
    rate = matmul_rate(model.config, chunk, compute.precision.compute)
    shared = workload.shared if work.shared_tokens else 0
    flops = sum(
        prefill_flops(model.config, shared, len(prompt) - shared) for prompt in workload.prompts
    )
    tokens = work.prompt_tokens + work.shared_tokens + work.new_tokens
    return {
        "rows_per_s": len(done) / seconds,
        "new_tokens_per_s": work.new_tokens / seconds,
        "tokens_per_s": tokens / seconds,
        "prompt_tokens": work.prompt_tokens + work.shared_tokens,
        "shared_tokens": work.shared_tokens,
        "new_tokens": work.new_tokens,
        "occupancy": work.occupancy,
        "padding": prefill.prefilled_places / prefill.prompt_tokens - 1,
        "prefill_tokens_per_s": prefill.prompt_tokens / prefill_seconds,
        "matmul_gflops": rate / 1e9,
        "matmul_share": flops / prefill_seconds / rate,
        "ready_s": ready,
        "peak_bytes": _peak_bytes() - before,
        "programs": engine.programs(),
        "outputs": [completion.tokens.tolist() for completion in done],
    }


def _timed(
    engine: Engine, prompts: list[list[int]], new: int, prefix: Prefix
) -> tuple[float, list[Completion], Work]:
    decoding = Decoding(0.0, max_new_tokens=new)
    requests = [
        Request(str(i), np.array(prompt, np.int32), record_key(0, "bench", str(i), 0), decoding)
        for i, prompt in enumerate(prompts)
    ]
    engine.work = Work()
    started = time.perf_counter()
    done = engine.generate(requests, prefix)
    return time.perf_counter() - started, done, engine.work


def prefill_flops(config: LlamaConfig, shared: int, own: int) -> float:
    """2 x the layers' matmul parameters x tokens, attention (4 x H x K a visible key), one head."""
    depth, width = config.num_hidden_layers, config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads * config.head_dim
    layer = width * (2 * heads + 2 * groups) + 3 * width * config.intermediate_size
    keys = own * shared + own * (own + 1) / 2
    return depth * (2.0 * layer * own + 4.0 * heads * keys) + 2.0 * width * config.vocab_size


def matmul_rate(config: LlamaConfig, rows: int, dtype: str) -> float:
    """FLOP/s of a layer's matrix products alone, at their shapes, the weights not in the cache."""
    heads = config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads * config.head_dim
    width, inner = config.hidden_size, config.intermediate_size
    shapes = [(width, heads), (width, groups), (width, groups), (heads, width)]
    shapes += [(width, inner), (width, inner), (inner, width)]
    layers = 8
    kernels = [[jnp.ones(shape, dtype) for shape in shapes] for _ in range(layers)]
    inputs = {size: jnp.ones((rows, size), dtype) for size in {shape[0] for shape in shapes}}

    @jax.jit
    def products(kernels: Any, inputs: Any) -> Any:
        return [
            jax.lax.dot(inputs[kernel.shape[0]], kernel, preferred_element_type=jnp.float32)
            for layer in kernels
            for kernel in layer
        ]

    jax.block_until_ready(products(kernels, inputs))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(products(kernels, inputs))
        best = min(best, time.perf_counter() - started)
    return layers * sum(2.0 * rows * a * b for a, b in shapes) / best


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps(measure(Workload.load(Path(sys.argv[1])), int(sys.argv[2]))))
