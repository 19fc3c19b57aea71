"""Our own training: `python -m humpback_jax.bench.sft JOB PRECISION`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from humpback_jax.bench.limits import matmul_rate, training_matmul_rate
from humpback_jax.bench.process import describe_machine, peak_bytes
from humpback_jax.bench.training_job import TrainingJob
from humpback_jax.compute import choose_compute, use_compilation_cache
from humpback_jax.model.flops import training_flops
from humpback_jax.model.linear import LoraSpec
from humpback_jax.model.lora import PROJECTIONS
from humpback_jax.models import load_model
from humpback_jax.training.optimizer import OptimizerSpec
from humpback_jax.training.trainer import TrainSpec, train


def measure(job: TrainingJob, precision: str) -> dict[str, Any]:
    """Rates of the job's steps, its first left out; nothing is compiled while the clock runs."""
    use_compilation_cache()
    before = peak_bytes()
    workload = job.workload
    model = load_model(workload.model)
    compute = choose_compute(precision, workload.batch_examples)
    adapter = workload.adapter()
    spec = TrainSpec(
        steps=job.steps,
        batch_examples=workload.batch_examples,
        row_tokens=workload.row_tokens,
        accumulation=compute.accumulation,
        optimizer=OptimizerSpec(
            workload.learning_rate, schedule="constant", name=workload.optimizer
        ),
        lora=adapter,
        precision=compute.precision,
        layout=compute.train_layout,
        remat=workload.remat,
        kernels=compute.kernels,
    )
    examples = job.examples()
    trained = train(model.config, model.params, examples, spec)
    peak = peak_bytes() - before
    steps = [row for row in trained.history if "loss" in row]
    timed = steps[1:]
    seconds = sum(row["seconds"] for row in timed)
    tokens, supervised = (sum(row[key] for row in timed) for key in ("tokens", "supervised_tokens"))
    pairs = sum(e.length * (e.length + 1) / 2 for e in examples[workload.batch_examples :])
    flops = training_flops(model.config, tokens, supervised, pairs, frozen=adapter is not None)
    dtype = compute.precision.compute
    rows = trained.plan.micro_rows * trained.plan.row_tokens
    return {
        "supervised_tokens_per_s": supervised / seconds,
        "tokens_per_s": tokens / seconds,
        "rows_per_s": len(timed) * workload.batch_examples / seconds,
        "seconds": seconds,
        "steps": len(timed),
        "precision": precision,
        "setting": _setting(adapter),
        "remat": workload.remat,
        "optimizer": workload.optimizer,
        "batch": workload.batch_examples,
        "packing_efficiency": trained.plan.efficiency,
        "row_tokens": trained.plan.row_tokens,
        "losses": [row["loss"] for row in steps],
        "compile_s": trained.compile_s,
        "peak_bytes": peak,
        "gflops": flops / seconds / 1e9,
        "matmul_share": flops / seconds / training_matmul_rate(model.config, rows, dtype),
        "forward_matmul_share": flops / seconds / matmul_rate(model.config, rows, dtype),
        "environment": describe_machine(),
    }


def _setting(adapter: LoraSpec | None) -> str:
    if adapter is None:
        return "full"
    targets = "all" if adapter.targets == PROJECTIONS else ",".join(adapter.targets)
    return f"LoRA {adapter.rank}, {targets}"


if __name__ == "__main__":
    print(json.dumps(measure(TrainingJob.load(Path(sys.argv[1])), sys.argv[2])))
