"""Runs a measurement of ours and of others in turn, each in its own process, and compares."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from humpback_jax.bench.workload import Workload, texts
from humpback_jax.environment import describe_environment
from humpback_jax.errors import HumpbackError
from humpback_jax.inference import common_start
from humpback_jax.models import load_model
from humpback_jax.weights.safetensors_io import save_hf

Say = Callable[[str], None]
PEERS = ("hf",)
HF_BATCHES = "8,16,32"


def bench_sample(
    model_name: str,
    data: str,
    rows: int,
    shortest: int,
    longest: int,
    max_new_tokens: int,
    precision: str,
    slots: int,
    peers: list[str],
    rounds: int,
    say: Say,
) -> dict[str, Any]:
    """Greedy instructions for real segments under the backward prompt, until the model stops.

    Args:
      data: documents; rows: how many of their segments of `shortest` to `longest` tokens.
      precision: "float32" or "bfloat16"; of the peers too.
      peers: other systems, measured in turn with ours on the same token ids and stop rule.
      rounds: measurements of each; the better one counts, for everybody.

    Raises:
      HumpbackError: too few segments, an unknown peer, or a measurement that failed.
    """
    unknown = sorted(set(peers) - set(PEERS))
    if unknown:
        raise HumpbackError(f"--vs={','.join(unknown)} is unknown; known: {', '.join(PEERS)}.")
    model = load_model(model_name)
    encode, prompt = model.tokenizer.encode, model.template.backward_prompt
    prompts = [encode(prompt(text)) for text in texts(model, data, rows, shortest, longest)]
    with tempfile.TemporaryDirectory(prefix="humpback-bench-") as folder:
        hf = Path(folder) / "hf"
        if peers:
            save_hf(hf, model.config, model.params)
        workload = Workload(
            model=model_name,
            hf=str(hf),
            precision=precision,
            prompts=prompts,
            shared=len(common_start(model.tokenizer, prompt)),
            max_new_tokens=max_new_tokens,
            stop_ids=list(model.stop_ids),
        )
        path = Path(folder) / "workload.json"
        workload.save(path)
        del model
        found: dict[str, list[dict[str, Any]]] = {}
        batches = HF_BATCHES if slots > 1 else "1"
        for number in range(rounds):
            for system in ("ours", *peers):
                options = [str(slots)] if system == "ours" else [batches]
                result = _in_its_own_process(system, path, options)
                batches = str(result.get("batch", batches))
                found.setdefault(system, []).append(result)
                rate, tokens = result["rows_per_s"], result["tokens_per_s"]
                say(f"round {number + 1}: {system} {rate:.2f} rows/s, {tokens:.0f} tokens/s")
    return _summary(found, workload)


def _in_its_own_process(system: str, workload: Path, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", f"humpback_jax.bench.{system}", str(workload), *options]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise HumpbackError(f"the measurement of {system} failed: {lines[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _summary(found: dict[str, list[dict[str, Any]]], workload: Workload) -> dict[str, Any]:
    best = {
        system: max(results, key=lambda result: result["rows_per_s"])
        for system, results in found.items()
    }
    outputs = {system: result["outputs"] for system, result in best.items()}
    peers = {system: _without_outputs(best[system]) for system in best if system != "ours"}
    for system, peer in peers.items():
        same = [a == b for a, b in zip(outputs["ours"], outputs[system], strict=True)]
        peer["same_text"] = statistics.mean(same)
    ours = _without_outputs(best["ours"])
    ours["all_rows_per_s"] = [result["rows_per_s"] for result in found["ours"]]
    for system, peer in peers.items():
        peer["all_rows_per_s"] = [result["rows_per_s"] for result in found[system]]
    lengths = sorted(map(len, workload.prompts))
    return {
        "ours": ours,
        "peers": peers,
        "ratio": {name: ours["rows_per_s"] / peer["rows_per_s"] for name, peer in peers.items()},
        "matmul_share": ours["matmul_share"],
        "workload": {
            "model": workload.model,
            "precision": workload.precision,
            "rows": len(lengths),
            "prompt_tokens": {
                "min": lengths[0],
                "median": lengths[len(lengths) // 2],
                "max": lengths[-1],
            },
            "max_new_tokens": workload.max_new_tokens,
        },
        "environment": describe_environment(),
    }


def _without_outputs(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "outputs"}
