"""What XLA says where a program, or an array, does not fit into a device's memory."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import jax

from humpback_jax.errors import HumpbackError

# TPU compilers tell what a program needs, or what it needs beside its arguments.
USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ")
TEMPORARY = re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds")
UNITS = {name: 1024**power for power, name in enumerate(("", "K", "M", "G", "T"))}


@dataclasses.dataclass(frozen=True)
class Shortage:
    """Bytes of a device that a program was found to need; `beside`: next to its arguments."""

    bytes: int
    beside: bool


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, of a device or of the host."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" in str(error)
    return isinstance(error, MemoryError)


def shortage(error: BaseException) -> Shortage | None:
    """How much was needed, where a compiler told."""
    used, temporary = USED.search(str(error)), TEMPORARY.search(str(error))
    found = used or temporary
    if not lacks_memory(error) or found is None:
        return None
    return Shortage(int(float(found[1]) * UNITS[found[2]]), used is None)


@contextlib.contextmanager
def room_for(what: str, advice: str) -> Iterator[None]:
    """Turns a lack of memory into a message that says what did not fit, and what to do.

    Raises:
      HumpbackError: memory is short.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        cause = (str(error).strip() or "MemoryError").splitlines()[0]
        raise HumpbackError(f"memory does not hold {what} ({cause}). {advice}") from error
