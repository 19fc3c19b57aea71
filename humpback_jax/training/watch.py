"""Looks at each step's figures, one step behind the devices, and stops a run that went wrong."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.training.examples import ExampleIndex, TrainingExample
from humpback_jax.training.goodput import Goodput
from humpback_jax.training.step import StepMetrics
from humpback_jax.training.utilization import Utilization, memory_in_use

Row = dict[str, Any]
WINDOW, LEAST = 64, 8  # losses that a spike is measured against, and how many it takes
NORMAL = 1.4826  # standard deviation of a normal distribution, by its median absolute deviation


class Dispatched(NamedTuple):
    """A step that was given to the devices."""

    step: int
    indices: np.ndarray  # [examples], of its examples
    metrics: StepMetrics


class Watch:
    """Turns steps into rows once their figures are there.

    Reading a figure waits for its step. The newest step is left alone until another one is
    dispatched, so that the devices always have work.
    """

    def __init__(
        self,
        examples: Sequence[TrainingExample],
        index: ExampleIndex,
        rate: Callable[[int], Any],
        utilization: Utilization,
        guard: Guard,
        goodput: Goodput,
        report: Callable[[Row], None],
    ) -> None:
        """
        Args:
          examples, index: of the run; an example is read only when its batch went wrong.
          rate: a step's learning rate.
          report: receives each row.
        """
        self._examples, self._index = examples, index
        self._rate, self._utilization = rate, utilization
        self._guard, self._goodput, self._report = guard, goodput, report
        self._waiting: deque[Dispatched] = deque()
        self._clock = goodput.clock()

    def idle(self) -> bool:
        """Whether the devices have nothing to do."""
        # jax.Array has it, its type stub does not.
        return not self._waiting or self._waiting[-1].metrics.grad_norm.is_ready()  # type: ignore[attr-defined]

    def add(self, step: int, indices: np.ndarray, metrics: StepMetrics) -> None:
        """A step on the examples of these indices was dispatched."""
        self._waiting.append(Dispatched(step, indices, metrics))

    def look(self, behind: int = 0) -> None:
        """Reports all steps but the newest `behind`.

        Raises:
          HumpbackError: a step went wrong; see `Guard`.
        """
        count = len(self._waiting) - behind
        if count <= 0:
            return
        jax.block_until_ready(self._waiting[count - 1].metrics)
        now = self._goodput.clock()
        seconds, self._clock = now - self._clock, now
        self._goodput.stepped(seconds)
        for _ in range(count):
            done = self._waiting.popleft()
            row = self._row(done, seconds / count)
            self._guard.check(row, functools.partial(self._names, done.indices))
            self._report(row)

    def _row(self, done: Dispatched, seconds: float) -> Row:
        nll, supervised = np.asarray(done.metrics.nll), np.asarray(done.metrics.supervised)
        tokens, targets = int(done.metrics.tokens), int(supervised.sum())
        lengths = self._index.lengths[done.indices].astype(np.float64)
        pairs = float((lengths * (lengths + 1)).sum() / 2)
        row: Row = {
            "step": done.step + 1,
            "loss": float(nll.sum() / supervised.sum()),
            "grad_norm": float(done.metrics.grad_norm),
            "tokens": tokens,
            "supervised_tokens": targets,
            "examples": len(done.indices),
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "supervised_tokens_per_s": targets / seconds,
            **self._utilization.of(tokens, targets, pairs, seconds),
            **memory_in_use(),
        }
        for index, source in enumerate(self._index.names):
            if supervised[index]:
                row[f"loss/{source}"] = float(nll[index] / supervised[index])
                row[f"supervised_tokens/{source}"] = int(supervised[index])
        row["learning_rate"] = float(self._rate(done.step))
        return row

    def _names(self, indices: np.ndarray) -> list[str]:
        return [self._examples[index].id for index in indices.tolist()]


class Guard:
    """Stops a run at a step whose loss is not finite, or suddenly far above those before it.

    A spike is a loss above the median of the last `WINDOW` steps by more than `spike_factor`
    standard deviations of theirs, which are estimated by the median absolute deviation, and taken
    as 1% of the median at least. 0 lets all spikes pass.
    """

    def __init__(self, spike_factor: float, evidence: Path | None) -> None:
        """`evidence`: the folder where a bad step's batch is described; None: nowhere."""
        self.factor, self._evidence = spike_factor, evidence
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def check(self, row: Row, names: Callable[[], list[str]]) -> None:
        """
        Args:
          names: gives the ids of the step's examples.

        Raises:
          HumpbackError: the step is bad; the message names it, and its examples.
        """
        loss, norm = row["loss"], row["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._stop(row, names(), f"the loss is {loss} and the gradient norm {norm}")
        limit = self._limit()
        if loss > limit:
            self._stop(row, names(), f"the loss jumped to {loss:.4f}, above {limit:.4f}")
        self._losses.append(loss)

    def _limit(self) -> float:
        if not self.factor or len(self._losses) < LEAST:
            return math.inf
        median = statistics.median(self._losses)
        deviation = NORMAL * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self.factor * max(deviation, 0.01 * abs(median))

    def _stop(self, row: Row, ids: list[str], what: str) -> None:
        message = (
            f"step {row['step']}: {what}; examples of that batch: {', '.join(ids)}. Lower the "
            "learning rate or inspect them."
        )
        if self._evidence is not None:
            path = self._evidence / f"bad_step_{row['step']}.json"
            if jax.process_index() == 0:
                text = json.dumps({"step": row["step"], "reason": what, "ids": ids}, indent=1)
                path.write_text(text, encoding="utf-8")
            message += f" They stand in {path}."
        raise HumpbackError(message)
