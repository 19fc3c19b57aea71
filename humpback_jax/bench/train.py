"""`humpback bench train`: our training and others', in turn, each in its own process."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from humpback_jax.bench import torch_sft
from humpback_jax.bench.comparison import Comparison
from humpback_jax.bench.process import (
    check_peer,
    leave_the_device_to_others,
    measure_apart,
    with_versions,
)
from humpback_jax.bench.training_job import TrainingJob, TrainingWorkload, training_rows
from humpback_jax.errors import HumpbackError
from humpback_jax.models import LanguageModel, export_hf, is_random, outlined
from humpback_jax.progress import Say

Result = dict[str, Any]
Setting = tuple[str, ...]  # what the measuring program is called with, after the job

# Each peer's settings; the fastest of them counts, and "trl_default" is TRL as it comes.
PEERS: dict[str, tuple[str, ...]] = {
    "trl": ("plain", "packed", "wrapped"),
    "trl_default": ("default",),
    "torch": torch_sft.SETTINGS,
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
    known = torch_sft.OPTIMIZERS if {*comparison.peers} == {"torch"} else ("adamw",)
    if workload.optimizer not in known and comparison.peers:
        raise HumpbackError(
            f"--vs={','.join(comparison.peers)} trains with {' or '.join(known)}: leave "
            f"--optimizer={workload.optimizer} or --vs out."
        )
    workload.adapter()
    if workload.steps < 2:
        raise HumpbackError(
            f"--steps={workload.steps}: the first step is not timed; take 2 or more."
        )
    leave_the_device_to_others()
    model = outlined(workload.model)
    chosen = training_rows(model, workload)
    with tempfile.TemporaryDirectory(prefix="humpback-bench-") as folder:
        hf = ""
        if comparison.peers:
            hf = str(Path(folder) / "hf")
            hand_over(Path(hf), model)
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
            known = PEERS[peer]
            chosen = fastest(peer, each, trial, say) if len(known) > 1 else known[0]
            systems.append((peer, PROGRAMS[peer], (each, chosen)))
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


def fastest(peer: str, precision: str, trial: Path, say: Say) -> str:
    """The peer's best setting; one that fails, for want of memory perhaps, is said and passed over.

    Raises:
      HumpbackError: all of them failed; it is the last one's.
    """
    rates: dict[str, float] = {}
    for setting in PEERS[peer]:
        try:
            rates[setting] = _rate(measure_apart(PROGRAMS[peer], trial, precision, setting))
        except HumpbackError as error:
            say(f"{peer} ({setting}, {precision}): {error}")
            if setting == PEERS[peer][-1] and not rates:
                raise
    return max(rates, key=lambda setting: rates[setting])


def hand_over(folder: Path, model: LanguageModel) -> None:
    """For the peers; of random weights they draw their own."""
    if not is_random(model.name):
        return export_hf(folder, model)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config.to_hf("float32")), "utf-8")
    model.tokenizer.save(folder)


def _rate(result: Result) -> float:
    return float(result["supervised_tokens_per_s"])
