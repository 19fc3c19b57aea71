"""Our own generation: `python -m humpback_jax.bench.ours WORKLOAD PRECISION SLOTS`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from humpback_jax.bench.limits import matmul_rate, prefill_flops
from humpback_jax.bench.process import describe_machine, peak_bytes
from humpback_jax.bench.workload import Workload
from humpback_jax.compute import choose_compute, use_compilation_cache, use_cores
from humpback_jax.inference import Inference
from humpback_jax.models import load_model
from humpback_jax.sampling.engine import Completion, Request, Work
from humpback_jax.sampling.replicas import Replicas
from humpback_jax.sampling.sampler import Decoding, record_key


def measure(workload: Workload, precision: str, slots: int) -> dict[str, Any]:
    """Rates of greedy generation, and of its prefill alone, after everything is compiled."""
    use_cores()
    use_compilation_cache()
    before = peak_bytes()
    started = time.perf_counter()
    model = load_model(workload.model)
    compute = choose_compute(precision, slots, drafts=workload.drafts, mesh=workload.mesh)
    reader = Inference(model, compute)
    opening = workload.prompts[0][: workload.shared]
    # The longest prompts decide how long the slots are, and with it the programs.
    longest = sorted(workload.prompts, key=len)[-2:]
    timed_generation(reader.replicas, longest, workload.max_new_tokens, opening)
    ready = time.perf_counter() - started
    seconds, done, work = timed_generation(
        reader.replicas, workload.prompts, workload.max_new_tokens, opening
    )
    prefill_seconds, _, prefill = timed_generation(reader.replicas, workload.prompts, 1, opening)
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
        "precision": precision,
        "batch": slots,
        "copies": len(reader.replicas.engines),
        "drafts": compute.engine_shape.drafts,
        "prompt_tokens": work.prompt_tokens + work.shared_tokens,
        "shared_tokens": work.shared_tokens,
        "new_tokens": work.new_tokens,
        "occupancy": work.occupancy,
        "padding": prefill.prefilled_places / prefill.prompt_tokens - 1,
        "prefill_tokens_per_s": prefill.prompt_tokens / prefill_seconds,
        "matmul_gflops": rate / 1e9,
        "matmul_share": flops / prefill_seconds / rate,
        "ready_s": ready,
        "peak_bytes": peak_bytes() - before,
        "programs": reader.replicas.programs(),
        "environment": describe_machine(),
        "outputs": [completion.tokens.tolist() for completion in done],
    }


def timed_generation(
    replicas: Replicas, prompts: Sequence[Sequence[int]], new: int, opening: Sequence[int] = ()
) -> tuple[float, list[Completion], Work]:
    """(seconds, texts, work) of drawing up to `new` tokens for each prompt, greedily."""
    decoding = Decoding(0.0, max_new_tokens=new)
    requests = [
        Request(str(i), np.array(prompt, np.int32), record_key(0, "bench", str(i), 0), decoding)
        for i, prompt in enumerate(prompts)
    ]
    replicas.forget_work()
    started = time.perf_counter()
    done = replicas.generate(requests, opening)
    return time.perf_counter() - started, done, replicas.work


if __name__ == "__main__":
    print(json.dumps(measure(Workload.load(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]))))
