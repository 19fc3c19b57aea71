"""`humpback bench train`: our training and others', in turn, each in its own process."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from humpback_jax.bench.process import check_peer, leave_the_device_to_others, measure_apart
from humpback_jax.bench.sample import PRECISIONS
from humpback_jax.bench.training_job import TrainingJob, training_rows
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
LEARNING_RATE = 1e-5


def bench_train(
    model_name: str,
    data: str,
    rows: int,
    steps: int,
    batch_examples: int,
    row_tokens: int,
    lora_rank: int,
    precision: str,
    peers: Sequence[str],
    rounds: int,
    say: Say,
) -> Result:
    """SFT on real rows: `steps` batches of the first `rows` of `data`, responses supervised.

    Args:
      row_tokens: the longest example, and the longest packed row.
      lora_rank: of an adapter on all projections; 0 for full tuning.
      precision: "float32" or "bfloat16", of the peers too; "best" measures each system in both, and
        the better one counts.
      peers: other systems, measured in turn with ours on the same batches.
      rounds: measurements of each; the best one counts, for everybody.

    Raises:
      HumpbackError: too few rows, an unknown or absent peer, or a measurement that failed.
    """
    for peer in peers:
        check_peer(peer, PACKAGES, "bench")
    if lora_rank and "torch" in peers:
        raise HumpbackError("--vs=torch tunes all weights: leave --lora or --vs=torch out.")
    if steps < 2:
        raise HumpbackError(f"--steps={steps}: the first step is not timed; take 2 or more.")
    leave_the_device_to_others()
    model = load_model(model_name)
    chosen = training_rows(model, data, rows, steps, batch_examples, row_tokens)
    with tempfile.TemporaryDirectory(prefix="humpback-bench-") as folder:
        hf = ""
        if peers:
            hf = str(Path(folder) / "hf")
            export_hf(Path(hf), model)
        del model
        job = TrainingJob(
            model_name, hf, row_tokens, batch_examples, lora_rank, LEARNING_RATE, chosen
        )
        found = _measure(job, Path(folder), precision, peers, rounds, say)
    best = {name: max(results, key=_rate) for name, results in found.items()}
    for name, results in found.items():
        best[name]["all"] = [
            [result["setting"], result["precision"], _rate(result)] for result in results
        ]
    ours = best.pop("ours")
    environment = ours.pop("environment")
    lengths = sorted(len(ids) for _, ids, _ in chosen)
    return {
        "ours": ours,
        "peers": best,
        "ratio": {name: _rate(ours) / _rate(peer) for name, peer in best.items()},
        "matmul_share": ours["matmul_share"],
        "workload": {
            "model": model_name,
            "data": Path(data).name,
            "rows": rows,
            "steps": steps,
            "batch_examples": batch_examples,
            "lora_rank": lora_rank,
            "row_tokens": row_tokens,
            "example_tokens": {
                "min": lengths[0],
                "median": lengths[len(lengths) // 2],
                "max": lengths[-1],
            },
        },
        "environment": environment,
    }


def _measure(
    job: TrainingJob, folder: Path, precision: str, peers: Sequence[str], rounds: int, say: Say
) -> dict[str, list[Result]]:
    """All results of each system."""
    whole, trial = folder / "job.json", folder / "trial.json"
    job.save(whole)
    count = min(TRIAL_STEPS, job.steps) * job.batch_examples
    dataclasses.replace(job, rows=job.rows[:count]).save(trial)
    precisions = PRECISIONS if precision == "best" else (precision,)
    systems: list[tuple[str, str, Setting]] = [("ours", "sft", (each,)) for each in precisions]
    for peer in peers:
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
    for number in range(rounds):
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
