"""A trace of a few steps, for xprof (TensorBoard) and ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

import jax

from humpback_jax.errors import HumpbackError

WARM_UP, TRACED = 2, 3  # steps before the trace, and in it


class StepTrace:
    """Traces the third to fifth step of a run into `FOLDER/plugins/profile/TIME/`.

    A shorter run has less in its trace, down to its last step.
    """

    def __init__(self, folder: Path | None, first: int, steps: int) -> None:
        """`first`: the first step that is done; `steps`: of the whole run."""
        self._folder, self._on = folder, False
        self._begin = max(min(first + WARM_UP, steps - TRACED), first)
        self._end = min(self._begin + TRACED, steps)

    def before(self, step: int, running: object) -> None:
        """Called before a step is dispatched; `running`: what earlier steps compute."""
        if self._folder is not None and step == self._begin < self._end:
            jax.block_until_ready(running)
            try:
                jax.profiler.start_trace(str(self._folder))
            except Exception as error:  # unwritable, or another trace is under way
                raise HumpbackError(f"--profile={self._folder}: {error}") from error
            self._on = True

    def after(self, step: int, running: object) -> None:
        """Called after a step was dispatched."""
        if self._on and step + 1 == self._end:
            jax.block_until_ready(running)
            self.stop()

    def stop(self) -> None:
        """Ends a trace under way, whatever happened in between."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
