"""Several processes that do one job: how they find each other, and how they wait."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from humpback_jax.errors import HumpbackError
from humpback_jax.parallel.rendezvous import meet

Made = TypeVar("Made")
START_SECONDS = 300
LEAVE_SECONDS = 10
WAIT_SECONDS = 14 * 24 * 3600
_waits = itertools.count()  # a barrier's name serves once


def join_processes() -> int:
    """Connects this process to the others of its job; has to run before devices are used.

    Three variables describe a job on any machines: `JAX_COORDINATOR_ADDRESS` (host:port of the
    first process), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. Where jax can find these itself (Cloud
    TPU slices, Slurm, Open MPI), `HUMPBACK_DISTRIBUTED=1` is enough.

    Returns:
      How many processes the job has; 1 where nothing says that it has more.

    Raises:
      HumpbackError: a variable is missing or no number, or not all processes came in time.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, number = (_variable(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    if address is None and os.environ.get("HUMPBACK_DISTRIBUTED") != "1":
        if (count or 1) > 1 or number:
            raise HumpbackError(
                "JAX_NUM_PROCESSES and JAX_PROCESS_ID describe a job of several processes, which "
                "meet at JAX_COORDINATOR_ADDRESS=HOST:PORT: set it, or leave the others out."
            )
        return 1
    if os.environ.get("HUMPBACK_DISTRIBUTED") == "1":
        address, count, number = _found(address, count, number)
    if address is None or count is None or number is None:
        raise HumpbackError(
            "JAX_COORDINATOR_ADDRESS is set; JAX_NUM_PROCESSES and JAX_PROCESS_ID must be, too."
        )
    meet(address, count, number, START_SECONDS)
    try:
        jax.distributed.initialize(address, count, number, initialization_timeout=START_SECONDS)
    except Exception as error:
        raise HumpbackError(
            f"the processes of this job could not be connected ({error}). Is one of them missing, "
            f"and {address} reachable from all?"
        ) from error
    # On CPUs they open their connections now, and not when one of them has been at work for long.
    wait_for_all("the start")
    return jax.process_count()


def leave_processes() -> None:
    """Lets the others of the job, if any, say why they end before this process does.

    The first process holds what connects them all: where it is gone, jax aborts the others at once.
    Returns when all have called this, or after `LEAVE_SECONDS`.
    """
    if not jax.distributed.is_initialized():
        return

    def leave() -> None:
        with contextlib.suppress(Exception):  # the others may be gone, or still at work
            jax.distributed.shutdown()

    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    leaving.join(LEAVE_SECONDS)


def _found(address: str | None, count: int | None, number: int | None) -> tuple[str, int, int]:
    """(address, number of processes, this process's number) as jax finds them where they are None.

    Raises:
      HumpbackError: it does not.
    """
    # jax tells nobody what it finds; asked here, those that are missing can be named.
    from jax._src.clusters import ClusterEnv

    try:
        address, count, number, _ = ClusterEnv.auto_detect_unset_distributed_params(
            address, count, number, None, None, START_SECONDS
        )
    except Exception as error:
        raise HumpbackError(
            f"HUMPBACK_DISTRIBUTED=1, and this cluster does not say what its job is ({error})."
        ) from error
    if address is None or count is None or number is None:
        raise HumpbackError(
            "HUMPBACK_DISTRIBUTED=1, and jax finds no Cloud TPU slice, Slurm or Open MPI job here. "
            "Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID instead."
        )
    return address, count, number


def _variable(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise HumpbackError(f"{name}={text!r} must be a whole number.")
    return None if text is None else int(text)


def wait_for_all(what: str) -> None:
    """Returns once every process of the job has called this with the same text."""
    if jax.process_count() > 1:
        from jax._src.distributed import global_state
        from jax.experimental import multihost_utils

        # On CPUs a collective gives up after half an hour; shares of a job may differ by more.
        if global_state.client is not None:
            global_state.client.wait_at_barrier(f"humpback {next(_waits)}", WAIT_SECONDS * 1000)
        multihost_utils.sync_global_devices(what)


def connect(mesh: Mesh | None) -> None:
    """Has the devices of a mesh exchange something along all of its axes, while all are there.

    Processes on CPUs open a connection when a group of devices first needs it, and then wait half a
    minute for each other: a host that takes longer to compile its first step would end the job.
    All processes of a job call this, each with a mesh of its own or one that it shares.
    """
    devices = [] if mesh is None else [*mesh.devices.flat]
    alone = len({device.process_index for device in devices}) < 2
    if mesh is None or alone or devices[0].platform != "cpu":
        return
    axes = [name for name, size in mesh.shape.items() if size > 1]
    groups = [
        chosen for size in range(1, len(axes) + 1) for chosen in itertools.combinations(axes, size)
    ]

    def met(one: jax.Array) -> list[jax.Array]:
        return [jax.lax.psum(one, group) for group in groups]

    everywhere = jax.shard_map(met, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    one = jax.device_put(np.float32(1), NamedSharding(mesh, PartitionSpec()))
    program = jax.jit(everywhere).lower(one).compile()
    wait_for_all("a mesh")
    jax.block_until_ready(program(one))


def all_or_none(
    what: str, make: Callable[[], Made], mild: type[HumpbackError] = HumpbackError
) -> Made:
    """Every process makes something; where one of them fails, none of them waits for it.

    Args:
      mild: errors of this class count less: they are raised where no process has another one.

    Raises:
      HumpbackError: that of `make`, or that another process has one, or one that counts more.
    """
    if jax.process_count() == 1:
        return make()
    from jax.experimental import multihost_utils

    made: Made | HumpbackError
    try:
        made = make()
    except HumpbackError as error:
        made = error
    weight = 0
    if isinstance(made, HumpbackError):
        weight = 1 if isinstance(made, mild) else 2
    weights = multihost_utils.process_allgather(np.array(weight))
    if not isinstance(made, HumpbackError) and not weights.any():
        return made
    if isinstance(made, HumpbackError) and weight == weights.max():
        raise made
    kind = mild if weights.max() == 1 else HumpbackError
    raise kind(f"{what} failed in process {weights.argmax()}; its message says why.")


def require_same(values: Mapping[str, str]) -> None:
    """Every process calls this with values that all of them have to share, by what they are.

    Raises:
      HumpbackError: in all of them, where they do not; names the processes that differ.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    own = [hashlib.sha256(value.encode()).digest()[:8] for value in values.values()]
    ours = np.frombuffer(b"".join(own), np.uint32).reshape(len(own), 2)
    gathered = multihost_utils.process_allgather(ours)
    faults = []
    for name, of_all in zip(values, gathered.swapaxes(0, 1), strict=True):
        same = (of_all[:, None] == of_all[None]).all(-1)  # [process, process]
        usual = same[same.sum(1).argmax()]
        if not usual.all():
            odd = [str(number) for number in np.flatnonzero(~usual)]
            who = f"process {odd[0]} has" if len(odd) == 1 else f"processes {', '.join(odd)} have"
            faults.append(f"{who} another {name} than process {usual.argmax()}")
    if faults:
        raise HumpbackError(
            f"{'; '.join(faults)}. Start all processes of a job with the same command, the same "
            "files and the same version of humpback_jax."
        )


def as_first_sees(numbers: Sequence[int]) -> list[int]:
    """The numbers of process 0, in every process: to others, a folder may look older."""
    if jax.process_count() == 1:
        return list(numbers)
    from jax.experimental.multihost_utils import broadcast_one_to_all

    count = int(broadcast_one_to_all(np.int32(len(numbers))))
    if not count:
        return []
    ours = numbers if jax.process_index() == 0 else [0] * count
    return [int(number) for number in broadcast_one_to_all(np.array(ours, np.int32))]


def on_host(tree: Any) -> Any:
    """The arrays as this process can read them: what lies with other processes is fetched."""

    def fetch(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch, tree)


def first_alone(what: str, make: Callable[[], Made]) -> Made:
    """Process 0 makes something, and the others after it.

    Raises:
      HumpbackError: that of `make`, or that process 0 has one.
    """
    if jax.process_index() == 0:
        return all_or_none(what, make)
    all_or_none(what, lambda: None)
    return make()
