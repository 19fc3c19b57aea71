"""What a run's time went to: steps, and everything that keeps the devices from them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

# Phases in which no step runs. Batches are made while a step runs; "data" is the time when none
# did, and part of what the steps took.
OUTSIDE = ("setup", "compile", "checkpoint", "validation")
PHASES = ("steps", *OUTSIDE, "data", "other")


class Goodput:
    """Clocks of one run, from its construction on."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._seconds = dict.fromkeys((*OUTSIDE, "data"), 0.0)
        self._stepping = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside for a phase of `PHASES`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - began

    def clock(self) -> float:
        """Seconds, which stand still in the phases outside of steps."""
        return time.monotonic() - sum(self._seconds[name] for name in OUTSIDE)

    def stepped(self, seconds: float) -> None:
        """Counts time that steps took, by `clock`."""
        self._stepping += seconds

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase until now."""
        found = {"steps": self._stepping - self._seconds["data"], **self._seconds}
        wall = time.monotonic() - self._started
        return {**found, "other": wall - sum(found.values())}


def goodput_line(seconds: dict[str, float]) -> str:
    """One line for people: "42.0 s: steps 81.0%, compile 12.3%, ..."."""
    wall = max(sum(seconds.values()), 1e-9)
    shares = sorted(seconds.items(), key=lambda item: (item[0] != "steps", -item[1]))
    parts = [f"{name} {share / wall:.1%}" for name, share in shares if share >= 0.0005 * wall]
    return f"{wall:.1f} s: {', '.join(parts)}"
