"""`humpback bench train`: our training and others', in turn, each in its own process."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from humpback_jax.bench.comparison import Comparison
from humpback_jax.bench.process import (
    check_peer,
    leave_the_device_to_others,
    measure_apart,
    with_versions,
)
from humpback_jax.bench.training_job import TrainingJob, TrainingWorkload, training_rows
from humpback_jax.errors import HumpbackError
from humpback_jax.models import export_hf, load_model
from humpback_jax.progress import Say

Result = dict[str, Any]
Setting = tuple[str, ...]  # what the measuring program is called with, after the job

# Each peer's settings; the fastest of them counts, and "trl_default" is TRL as it comes.
PEERS: dict[str, tuple[str, ...]] = {
    "trl": ("plain", "packed", "wrapped"),
    "trl_default": ("default",),
    "torch": ("plain", "checkpointed"),
}
PROGRAMS = {"trl": "trl", "trl_default": "trl", "torch": "torch_sft"}
PACKAGES = {"trl": ("torch", "trl"), "trl_default": ("torch", "trl"), "torch": ("torch",)}
TRIAL_STEPS = 3  # on which a peer's setting is chosen


def bench_train(workload: TrainingWorkload, comparison: Comparison, say: Say) -> Result:
    """Supervised tokens a second, ours and others' on the same batches.

    Raises:
      HumpbackError: too few rows, an unknown or absent peer, or a measurement that failed.
    """
    for peer in comparison.peers:
        check_peer(peer, PACKAGES, "bench")
    if workload.lora_rank and "torch" in comparison.peers:
        raise HumpbackError("--vs=torch tunes all weights: leave --lora or --vs=torch out.")
    if workload.optimizer != "adamw" and comparison.peers:
        raise HumpbackError("--vs trains with AdamW: leave --optimizer or --vs out.")
    workload.adapter()
    if workload.steps < 2:
        raise HumpbackError(
            f"--steps={workload.steps}: the first step is not timed; take 2 or more."
        )
    leave_the_device_to_others()
    model = load_model(workload.model)
    chosen = training_rows(model, workload)
    with tempfile.TemporaryDirectory(prefix="humpback-bench-") as folder:
        hf = ""
        if comparison.peers:
            hf = str(Path(folder) / "hf")
            export_hf(Path(hf), model)
        del model
        found = _measure(TrainingJob(workload, chosen, hf), Path(folder), comparison, say)
    best = {name: max(results, key=_rate) for name, results in found.items()}
    for name, results in found.items():
        best[name]["all"] = [
            [result["setting"], result["precision"], _rate(result)] for result in results
        ]
    ours = best.pop("ours")
    modules = [name for peer in comparison.peers for name in PACKAGES[peer]]
    environment = with_versions(ours.pop("environment"), modules)
    lengths = sorted(len(ids) for _, ids, _ in chosen)
    return {
        "ours": ours,
        "peers": best,
        "ratio": {name: _rate(ours) / _rate(peer) for name, peer in best.items()},
        "matmul_share": ours["matmul_share"],
        "workload": {
            **dataclasses.asdict(workload),
            "data": Path(workload.data).name,
            "example_tokens": {
                "min": lengths[0],
                "median": lengths[len(lengths) // 2],
                "max": lengths[-1],
            },
        },
        "environment": environment,
    }


def _measure(
    job: TrainingJob, folder: Path, comparison: Comparison, say: Say
) -> dict[str, list[Result]]:
    """All results of each system."""
    whole, trial = folder / "job.json", folder / "trial.json"
    job.save(whole)
    count = min(TRIAL_STEPS, job.steps) * job.workload.batch_examples
    dataclasses.replace(job, rows=job.rows[:count]).save(trial)
    precisions = comparison.precisions
    systems: list[tuple[str, str, Setting]] = [("ours", "sft", (each,)) for each in precisions]
    for peer in comparison.peers:
        # TRL as it comes computes in bfloat16.
        formats = ("bfloat16",) if peer == "trl_default" else precisions
        for each in formats:
            tried = {
                (each, setting): _rate(measure_apart(PROGRAMS[peer], trial, each, setting))
                for setting in PEERS[peer]
                if len(PEERS[peer]) > 1
            }
            best = max(tried, key=lambda setting: tried[setting], default=(each, PEERS[peer][0]))
            systems.append((peer, PROGRAMS[peer], best))
    found: dict[str, list[Result]] = {}
    for number in range(comparison.rounds):
        for name, program, setting in systems:
            result = measure_apart(program, whole, *setting)
            found.setdefault(name, []).append(result)
            say(
                f"round {number + 1}: {name} ({result['setting']}, {result['precision']}) "
                f"{_rate(result):.1f} supervised tokens/s"
            )
    return found


def _rate(result: Result) -> float:
    return float(result["supervised_tokens_per_s"])
