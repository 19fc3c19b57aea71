"""A measurement in a process of its own, and what that process can say about itself."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from humpback_jax.environment import describe_environment
from humpback_jax.errors import HumpbackError

CPU_INFO = Path("/proc/cpuinfo")
STATUS = Path("/proc/self/status")


def measure_apart(module: str, *options: str | Path, seconds: float | None = None) -> Any:
    """Runs `python -m humpback_jax.bench.MODULE OPTIONS` and returns the JSON it prints last.

    Raises:
      HumpbackError: it failed, or took longer than `seconds`.
    """
    name = f"humpback_jax.bench.{module}"
    command = [sys.executable, "-m", name, *map(str, options)]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "0"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        raise HumpbackError(f"the measurement {module} took more than {seconds:.0f} s.") from error
    if done.returncode < 0:
        by = signal.Signals(-done.returncode)
        hint = ", as the system does where memory runs out: lower --batch-size"
        hint = hint if by == signal.SIGKILL else ""
        raise HumpbackError(f"the measurement {module} was stopped by {by.name}{hint}.")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise HumpbackError(f"the measurement {module} failed: {lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def check_peer(peer: str, packages: Mapping[str, Sequence[str]], extra: str) -> None:
    """
    Args:
      packages: what each known peer needs. extra: of ours, which brings it.

    Raises:
      HumpbackError: the peer is unknown, or not installed.
    """
    if peer not in packages:
        raise HumpbackError(f"--vs={peer} is unknown; known: {', '.join(packages)}.")
    absent = [name for name in packages[peer] if importlib.util.find_spec(name) is None]
    if absent:
        raise HumpbackError(
            f"--vs={peer} needs {' and '.join(absent)}; in the clone: pip install -c "
            f"constraints.txt -e '.[{extra}]'."
        )


def describe_machine() -> dict[str, Any]:
    """What a figure was measured with and on: a run's environment, and the processor's name."""
    return {**describe_environment(), "cpu": cpu_model()}


def cpu_model(info: Path = CPU_INFO) -> str:
    """The processor's name, as Linux tells it on x86, else what Python knows."""
    with contextlib.suppress(OSError):
        for line in info.read_text(encoding="utf-8").splitlines():
            field, _, value = line.partition(":")
            if field.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def with_versions(environment: dict[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """An environment whose packages name those of the peers, too."""
    owners = importlib.metadata.packages_distributions()
    versions = {owners[name][0]: importlib.metadata.version(owners[name][0]) for name in modules}
    return {**environment, "packages": {**environment["packages"], **versions}}


def leave_the_device_to_others() -> None:
    """Keeps this process on the CPU: a GPU's memory belongs to the process that measures."""
    jax.config.update("jax_platforms", "cpu")


def peak_bytes() -> int:
    """The most memory in use at one time so far: of the accelerator, else of the process."""
    found = jax.devices()[0].memory_stats()
    if found and "peak_bytes_in_use" in found:
        return int(found["peak_bytes_in_use"])
    return resident_peak()


def resident_peak(status: Path = STATUS) -> int:
    """The most of this process that was in memory so far, in bytes.

    Not by `getrusage` on Linux: its count starts with the peak of the process that started this
    one, so that all measurements of a large parent look alike.
    """
    with contextlib.suppress(OSError):
        for line in status.read_text(encoding="utf-8").splitlines():
            field, _, value = line.partition(":")
            if field == "VmHWM":
                return int(value.split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Compilations:
    """Counts the programs that XLA compiles, or loads compiled, from now on."""

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **details: str | int) -> None:
        self.count += event == self._EVENT
