"""All figures of one GPU in one call: `python -m humpback_jax.bench.gpu`; see benchmarks/gpu.sh.

Random weights in the shapes of real models: nothing is downloaded. Each part is a process of its
own; one that fails, or finds no time, is written as such, and the others count.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from humpback_jax.artifacts import write_json
from humpback_jax.errors import HumpbackError
from humpback_jax.model.llama import count_parameters
from humpback_jax.models import load_config
from humpback_jax.progress import timed_lines

LARGE = 4e9  # parameters
CUDA_TORCH = "import torch, transformers; raise SystemExit(not torch.cuda.is_available())"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", allow_abbrev=False)
    parser.add_argument("--shapes", default="tinyllama,llama2_7b", help="of the roofline")
    parser.add_argument("--batches", default="32,128,256", help="rows decoded together")
    parser.add_argument("--train", default="random:tinyllama,random:llama3_8b", help="models")
    parser.add_argument("--model", default="random:tinyllama", help="of the other measurements")
    parser.add_argument("--rows", type=int, default=256, help="of segments; half as many pairs")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=570, help="for everything together")
    parser.add_argument("--out", default="benchmarks", help="folder of gpu_DEVICE.json")
    arguments = parser.parse_args(argv)
    say, end = timed_lines(), time.monotonic() + arguments.seconds
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="humpback-bench-") as folder:
        for name, command in parts(arguments, Path(folder)).items():
            say(f"{name} ...")
            try:
                printed = run_until(end, command)
                result[name] = json.loads(printed.strip().splitlines()[-1])
                say(f"{name}: {json.dumps(figures(result[name]))}")
            except HumpbackError as error:
                result[name] = {"failed": str(error)}
                say(f"{name}: {error}")
            path = Path(arguments.out) / f"gpu_{device_name(result)}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, result)
    say(f"wrote {path}")
    return int(any("failed" in part for part in result.values()))


def parts(arguments: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The command of each part, whose last line is its JSON."""
    python = [sys.executable, "-m"]
    commands = {
        shape: [*python, "humpback_jax.bench.roofline", shape, arguments.batches]
        for shape in arguments.shapes.split(",")
    }
    bench = [*python, "humpback_jax", "bench"]
    common = [f"--model={arguments.model}", f"--batch-size={arguments.batch_size}"]
    common += ["--precision=bfloat16", "--json"]
    peers = ["--vs=hf"] if _torch_sees_the_gpu() else []
    for model in arguments.train.split(","):
        commands[f"train {model}"] = [*bench, "train", *_training(model)]
    commands["sample"] = [*bench, "sample", *common, f"--rows={arguments.rows}", *peers]
    commands["score"] = [*bench, "score", *common, f"--rows={-(-arguments.rows // 2)}"]
    return commands


def _training(model: str) -> list[str]:
    """Full tuning in bfloat16, packed to rows of 2,048 tokens, of 32 and of 16 examples a step.

    Where float32 weights, gradients and AdamW's moments would take more than half of a GPU's memory
    of today, Adafactor trains, and layers keep nothing but what they begin with.
    """
    options = [f"--model={model}", "--row-tokens=2048", "--precision=bfloat16", "--json"]
    peers = ["torch"] if _torch_sees_the_gpu() else []
    if count_parameters(load_config(model)) > LARGE:
        options += ["--batch-size=16", "--rows=120", "--optimizer=adafactor", "--remat=full"]
    else:
        options += ["--batch-size=32", "--rows=176", "--steps=5", "--remat=named"]
        peers += ["trl"] if peers and importlib.util.find_spec("trl") else []
    return [*options, *([f"--vs={','.join(peers)}"] if peers else [])]


def _torch_sees_the_gpu() -> bool:
    done = subprocess.run([sys.executable, "-c", CUDA_TORCH], capture_output=True, check=False)
    return done.returncode == 0


def run_until(end: float, command: Sequence[str]) -> str:
    """What a command prints; it and its children are killed at `end` (`time.monotonic()`).

    Raises:
      HumpbackError: it failed, or there was no time left.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=max(end - time.monotonic(), 0))
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise HumpbackError("no time left; raise --seconds.") from error
    if process.returncode:
        raise HumpbackError((errors.strip().splitlines() or ["no message"])[-1])
    return printed


def figures(part: dict[str, Any]) -> dict[str, Any]:
    """Those that a person looks for."""
    if "decode" in part:
        return {"decode": part["decode"], "prefill": part["prefill"]}
    ours = part["ours"]
    names = ("rows_per_s", "tokens_per_s", "matmul_share", "likelihood_gain", "prefix_gain_share")
    return {name: ours[name] for name in names if name in ours} | {"ratio": part["ratio"]}


def device_name(result: dict[str, Any]) -> str:
    names = [part["device"] for part in result.values() if "device" in part]
    return re.sub(r"\W+", "_", names[0]) if names else "unknown"


if __name__ == "__main__":
    sys.exit(main())
