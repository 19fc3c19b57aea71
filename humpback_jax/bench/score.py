"""`humpback bench score`: each curator on the same pairs, each in its own process."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from humpback_jax.bench.pairs import PairsJob
from humpback_jax.bench.process import measure_apart
from humpback_jax.progress import Say

CURATORS = ("rubric", "rubric_likelihood", "pmi", "combined")
TARGETS = {"likelihood_gain": 2.0, "prefix_gain_share": 0.85}  # on CPU
FASTEST = ("seconds", "bare_prefill_seconds", "seconds_without_sharing")

Result = dict[str, Any]


def bench_score(job: PairsJob, rounds: int, say: Say) -> Result:
    """What rating costs, by curator; `rubric_likelihood` stands for us at the top of the result.

    Args:
      rounds: measurements of each curator; the fastest of each time counts.

    Raises:
      HumpbackError: a measurement that failed.
    """
    found: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory(prefix="humpback-bench-") as folder:
        path = Path(folder) / "job.json"
        job.save(path)
        for number in range(rounds):
            for curator in CURATORS:
                result = measure_apart("rate", path, curator)
                found.setdefault(curator, []).append(result)
                say(f"round {number + 1}: {curator} {result['rows_per_s']:.2f} rows/s")
    curators = {curator: best_of(results) for curator, results in found.items()}
    environment = [result.pop("environment") for result in curators.values()]
    return {
        "ours": {**curators["rubric_likelihood"], **gains(curators), "curators": curators},
        "peers": {},
        "ratio": {},
        "matmul_share": curators["rubric_likelihood"]["matmul_share"],
        "targets": TARGETS,
        "workload": {
            "model": job.model,
            "precision": job.precision,
            "data": job.data,
            "rows": len(job.pairs),
            "max_new_tokens": job.max_new_tokens,
            "batch": job.slots,
        },
        "environment": environment[0],
    }


def best_of(results: list[Result]) -> Result:
    """The fastest measurement, each of its times the least of any round."""
    best = dict(max(results, key=lambda result: result["rows_per_s"]))
    for name in FASTEST:
        if name in best:
            best[name] = min(result[name] for result in results)
    if "bare_prefill_seconds" in best:
        best["prefill_ratio"] = best["seconds"] / best["bare_prefill_seconds"]
    best["all_rows_per_s"] = [result["rows_per_s"] for result in results]
    return best


def gains(curators: dict[str, Result]) -> dict[str, Any]:
    """What reading instead of writing, and sharing the prompts' beginning, are worth.

    `prefix_gain_share` compares the time saved with the tokens saved.
    """
    likelihood, pmi = curators["rubric_likelihood"], curators["pmi"]
    gain = likelihood["seconds_without_sharing"] / likelihood["seconds"]
    tokens = likelihood["prompt_tokens"] / likelihood["unshared_tokens"]
    return {
        "likelihood_gain": likelihood["rows_per_s"] / curators["rubric"]["rows_per_s"],
        "prefix_gain": gain,
        "prefix_gain_share": gain / tokens,
        "log_p_y_once": pmi["log_p_y"]["once"],
    }
