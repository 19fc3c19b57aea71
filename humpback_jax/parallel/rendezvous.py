"""All processes of a job meet before jax connects them, which aborts those that wait in vain.

The first one listens on the coordinator's port, which jax opens afterwards; the others tell it
their numbers. When all have come, or the time is up, it tells them who is missing: each ends with
the same message.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

from humpback_jax.errors import HumpbackError

PAUSE = 0.1  # seconds between two tries to reach the first process
GREETING_SECONDS = 5  # for a number, from whoever connects


def meet(address: str, count: int, number: int, seconds: float) -> None:
    """Returns once all of `count` processes have called this, each with its own number.

    Args:
      address: host:port of the first process, as jax takes it.
      seconds: how long to wait for the others.

    Raises:
      HumpbackError: some are missing (the message names them), two have the same number, or the
        address is none.
    """
    host, port = _parts(address)
    if not 0 <= number < count:
        raise HumpbackError(
            f"JAX_PROCESS_ID={number} has to be less than JAX_NUM_PROCESSES={count}."
        )
    if number == 0:
        _gather(port, count, seconds)
    else:
        _report(host, port, count, number, seconds)


def _parts(address: str) -> tuple[str, int]:
    """Host and port."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise HumpbackError(f"JAX_COORDINATOR_ADDRESS={address!r} has to be HOST:PORT.")
    return host.strip("[]"), int(port)


def _gather(port: int, count: int, seconds: float) -> None:
    """The first process's part."""
    deadline = time.monotonic() + seconds
    came: set[int] = set()
    others: list[socket.socket] = []
    fault = ""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listening(port))
        while len(came) < count - 1 and not fault:
            listening.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                other = stack.enter_context(listening.accept()[0])
            except TimeoutError:
                fault = _missing(sorted({*range(1, count)} - came), count, seconds)
                break
            told = _read(other, GREETING_SECONDS)
            if not isinstance(told, dict) or not {"number", "count"} <= {*told}:
                continue  # somebody else's
            if told["count"] != count or told["number"] in came:
                fault = (
                    f"process {told['number']} of {told['count']} came twice, or to a job of "
                    f"{count} processes. Check JAX_PROCESS_ID and JAX_NUM_PROCESSES on each host."
                )
            came.add(told["number"])
            others.append(other)
        for other in others:
            with contextlib.suppress(OSError):
                _write(other, {"fault": fault})
    if fault:
        raise HumpbackError(fault)


def _report(host: str, port: int, count: int, number: int, seconds: float) -> None:
    """Every other process's part."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            first = socket.create_connection((host, port), timeout=max(PAUSE, seconds / 10))
            break
        if time.monotonic() > deadline:
            raise HumpbackError(
                f"{_missing([0], count, seconds)} Nothing answers at {host}, port {port}."
            )
        time.sleep(PAUSE)
    with first:
        answer = None
        with contextlib.suppress(OSError):
            _write(first, {"number": number, "count": count})
            # The first process may have come last, and then waits as long as this one has.
            answer = _read(first, 2 * seconds)
    if not isinstance(answer, dict):
        raise HumpbackError(f"process {number} of {count}: process 0 ended; its message says why.")
    if answer["fault"]:
        raise HumpbackError(answer["fault"])


def _missing(numbers: list[int], count: int, seconds: float) -> str:
    named = ", ".join(map(str, numbers))
    which = f"process {named} is" if len(numbers) == 1 else f"processes {named} are"
    return (
        f"{which} missing of the {count} of this job (0 to {count - 1}) after {seconds:g} s. Start "
        "all of them within that time, on hosts that reach the first one."
    )


def _listening(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise HumpbackError(
            f"port {port}, where the processes of this job are to meet, cannot be opened "
            f"({error.strerror}); name another one by JAX_COORDINATOR_ADDRESS=HOST:PORT."
        ) from error


def _write(to: socket.socket, message: dict[str, Any]) -> None:
    to.sendall(json.dumps(message).encode() + b"\n")


def _read(of: socket.socket, seconds: float) -> Any:
    """The next line; None where none comes in time."""
    of.settimeout(seconds)
    try:
        with of.makefile("rb") as lines:
            return json.loads(lines.readline(10_000))
    except (OSError, ValueError):
        return None
