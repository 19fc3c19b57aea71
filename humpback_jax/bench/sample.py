"""`humpback bench sample`: our generation and others', in turn, each in its own process."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from humpback_jax.bench.comparison import Comparison
from humpback_jax.bench.process import (
    check_peer,
    leave_the_device_to_others,
    measure_apart,
    with_versions,
)
from humpback_jax.bench.workload import Case, Workload, backward_workload
from humpback_jax.errors import HumpbackError
from humpback_jax.models import is_random, load_model
from humpback_jax.progress import Say
from humpback_jax.weights.named import resolve
from humpback_jax.weights.safetensors_io import save_hf

PACKAGES = {"hf": ("torch", "transformers"), "llamacpp": ("llama_cpp",)}  # of each peer
EXTRAS = {"hf": "bench", "llamacpp": "llamacpp"}

Result = dict[str, Any]


def bench_sample(
    model_name: str,
    data: str,
    cases: Sequence[Case],
    max_new_tokens: int,
    comparison: Comparison,
    say: Say,
) -> Result:
    """Greedy instructions for real segments under the backward prompt, until the model stops.

    Args:
      data: documents, of which segments are taken.
      cases: the first is the main one, whose figures stand at the top of the result.
      comparison: the peers have the same token ids and stop rule.

    Raises:
      HumpbackError: too few segments, an unknown or absent peer, or a measurement that failed.
    """
    gguf = _check_peers(comparison.peers, model_name)
    leave_the_device_to_others()
    model = load_model(model_name)
    with tempfile.TemporaryDirectory(prefix="humpback-bench-") as folder:
        hf = ""
        if "hf" in comparison.peers:
            hf = str(Path(folder) / "hf")
            save_hf(Path(hf), model.config, model.params)
        workloads = [
            backward_workload(model, data, case, max_new_tokens, hf, gguf) for case in cases
        ]
        del model
        compared = {}
        for case, workload in zip(cases, workloads, strict=True):
            path = Path(folder) / f"{case.name}.json"
            workload.save(path)
            found = _measure(case, path, _systems(comparison), comparison.rounds, say)
            compared[case.name] = _compare(found, workload)
    environment = [result["ours"].pop("environment") for result in compared.values()]
    modules = [name for peer in comparison.peers for name in PACKAGES[peer]]
    return {
        **compared[cases[0].name],
        "main_case": cases[0].name,
        "cases": compared,
        "environment": with_versions(environment[0], modules),
    }


def _check_peers(peers: Sequence[str], model_name: str) -> str:
    """The model's GGUF file where a peer needs it, else ""."""
    gguf = ""
    for peer in peers:
        if peer == "llamacpp":
            gguf = _gguf_file(model_name)
        check_peer(peer, PACKAGES, EXTRAS.get(peer, ""))
    return gguf


def _gguf_file(model_name: str) -> str:
    if not is_random(model_name):
        found = resolve(model_name)
        if found.kind == "gguf":
            return str(found.path)
    raise HumpbackError(
        f"--vs=llamacpp reads GGUF files, and --model={model_name} is none. Use a .gguf file, or "
        "smollm2-135m-instruct, which is stored as one."
    )


def _systems(comparison: Comparison) -> list[tuple[str, str]]:
    """(system, precision) of each measurement of a round."""
    systems = [("ours", each) for each in comparison.precisions]
    for peer in comparison.peers:
        formats = comparison.precisions if peer == "hf" else ("stored",)
        systems += [(peer, each) for each in formats]
    return systems


def _measure(
    case: Case, workload: Path, systems: Sequence[tuple[str, str]], rounds: int, say: Say
) -> dict[str, list[Result]]:
    """All results of each system."""
    sizes = sorted({max(case.slots // part, 1) for part in (4, 2, 1)})
    # A peer tries batch sizes the first time, and keeps to the best.
    batches = {system: ",".join(map(str, sizes)) for system in systems if system[0] != "ours"}
    found: dict[str, list[Result]] = {}
    for number in range(rounds):
        for system in systems:
            name, precision = system
            size = batches.get(system, str(case.slots))
            result = measure_apart(name, workload, precision, size)
            if system in batches:
                batches[system] = str(result["batch"])
            found.setdefault(name, []).append(result)
            say(
                f"{case.name}, round {number + 1}: {name} {result['precision']} "
                f"{result['rows_per_s']:.2f} rows/s, {result['tokens_per_s']:.0f} tokens/s"
            )
    return found


def _compare(found: dict[str, list[Result]], workload: Workload) -> Result:
    best = {name: max(results, key=_rate) for name, results in found.items()}
    systems = {}
    for name, result in best.items():
        systems[name] = {key: value for key, value in result.items() if key != "outputs"}
        rates = [[each["precision"], each["rows_per_s"]] for each in found[name]]
        systems[name]["all_rows_per_s"] = rates
    ours = systems.pop("ours")
    for name, peer in systems.items():
        pairs = zip(best["ours"]["outputs"], best[name]["outputs"], strict=True)
        peer["same_text"] = statistics.mean(a == b for a, b in pairs)
    lengths = sorted(map(len, workload.prompts))
    return {
        "ours": ours,
        "peers": systems,
        "ratio": {name: ours["rows_per_s"] / peer["rows_per_s"] for name, peer in systems.items()},
        "matmul_share": ours["matmul_share"],
        "workload": {
            "model": workload.model,
            "data": workload.data,
            "rows": len(lengths),
            "prompt_tokens": {
                "min": lengths[0],
                "median": lengths[len(lengths) // 2],
                "max": lengths[-1],
            },
            "max_new_tokens": workload.max_new_tokens,
        },
    }


def _rate(result: Result) -> float:
    return float(result["rows_per_s"])
