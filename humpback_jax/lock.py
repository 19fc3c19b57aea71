"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from humpback_jax.errors import HumpbackError


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Keeps other processes that ask for the folder out, until the block or the process ends.

    The kernel lets go of the lock of a killed process. On file systems without locks nothing is
    kept out.

    Raises:
      HumpbackError: another process is in there.
    """
    with open(folder / ".lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HumpbackError(
                f"{folder}: another humpback is at work there, and two would overwrite each "
                "other's files. Wait for it, stop it, or choose another folder."
            ) from error
        except OSError:  # this file system has no locks
            pass
        yield
