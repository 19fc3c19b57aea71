"""A machine that is taken away says so first: SIGTERM is noticed, and obeyed between two steps."""

from __future__ import annotations

import itertools
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax

from humpback_jax.errors import Preempted

# JAX agrees on the number of a call, the first one being 1: of a run that goes on from step 50, the
# steps themselves would never be the agreed number.
_CALLS = itertools.count(1)


class StopSignal:
    """Notes SIGTERM instead of dying of it, while it is entered as a context.

    Python lets only the main thread do this; anywhere else it does nothing. Of a job of several
    processes, JAX's own handler notes the signal of each: another one would hide it.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> StopSignal:
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`; several processes all learn it after the same one.

        They have to call this equally often.
        """
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(next(_CALLS)))

    def obey(self, done: str) -> None:
        """Stops here if SIGTERM came too late for `reached`, which is to say during the end.

        Raises:
          Preempted: it came.
        """
        if self._asked:
            raise Preempted(f"{done}; run it again to continue.")
