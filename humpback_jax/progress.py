"""Lines that say how far a long job is."""

from __future__ import annotations

import time
from collections.abc import Callable

Say = Callable[[str], None]
EVERY = 5.0  # seconds, or where that is more
SHARE = 0.02  # of the time since the start, so that a job of days fills no disk with lines


def timed_lines() -> Say:
    """Prints lines with the time since the start, flushed at once."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:7.1f}s] {text}", flush=True)

    return say


class Progress:
    """Says how many rows of `total` are done, how fast, and how long the rest will take."""

    def __init__(self, name: str, total: int, say: Say, done: int = 0) -> None:
        """`done`: rows that an earlier start has finished; they do not count for the rate."""
        self._name, self._total, self._say = name, total, say
        self._before = self._done = done
        self._started = self._said = time.monotonic()

    def add(self, rows: int, detail: Callable[[float], str] = lambda seconds: "") -> None:
        """`detail` is given the seconds since the start, and added to the line if one is due."""
        if not rows:
            return
        self._done += rows
        now = time.monotonic()
        due = max(EVERY, SHARE * (now - self._started))
        if now - self._said < due and self._done < self._total:
            return
        self._said = now
        seconds = max(now - self._started, 1e-9)
        rate = (self._done - self._before) / seconds
        left = (self._total - self._done) / rate if rate else float("inf")
        parts = [f"{self._done:,} of {self._total:,} rows", f"{rate:.2f} rows/s", detail(seconds)]
        parts.append(f"{left:.0f} s left" if left < 600 else f"{left / 3600:.1f} h left")
        self._say(f"{self._name}: " + ", ".join(part for part in parts if part))
