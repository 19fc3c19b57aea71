"""How many rows fit: planned from a budget before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from humpback_jax.errors import HumpbackError
from humpback_jax.model.cache import cache_bytes
from humpback_jax.model.config import LlamaConfig

KEPT_FREE = 0.1  # of the device's memory, for the compiler's own buffers
LOGITS = 4  # float32 arrays of [rows, vocabulary] that drawing holds at a time
GIB = 1024**3


def device_bytes(device: Any) -> int:
    """Memory that a plan may count on: the accelerator's, or what the machine has available."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] * (1 - KEPT_FREE))
    share = (_available_bytes() + _resident_bytes()) * (1 - KEPT_FREE)
    return int(share / jax.local_device_count())


def _available_bytes() -> int:
    """Of the machine, or of the control group that holds this process, if that is less."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    if not limits:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        if limit != "max":
            limits.append(int(limit) - used)
    except (OSError, ValueError):
        pass  # no control group, or one without a limit
    return max(min(limits), 0)


def _resident_bytes() -> int:
    """What this process holds already, weights included."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def tree_bytes(tree: Any) -> int:
    """Of arrays: what the fullest of our devices holds."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def rows_that_fit(
    config: LlamaConfig,
    kv: str,
    capacity: int,
    wanted: int,
    budget: int,
    weights: int,
    prefill_tokens: int,
    tensor: int = 1,
) -> int:
    """Rows decoded together on one device: `wanted`, or fewer by halves.

    Args:
      kv: dtype of the cache. capacity: places of a row in it.
      budget, weights: bytes of one device, and what the weights take of them.
      prefill_tokens: computed in one call. tensor: devices that share the key/value heads.

    Raises:
      HumpbackError: not even one row fits.
    """
    shared = tensor if config.num_key_value_heads % tensor == 0 else 1
    row = cache_bytes(config, 1, capacity, kv) // shared + config.vocab_size * (4 * LOGITS + 1)
    activations = 4 * (6 * config.hidden_size + 3 * config.intermediate_size)
    free = budget - weights - prefill_tokens * activations
    rows = wanted
    while rows > 1 and rows * row > free:
        rows = (rows + 1) // 2
    if rows * row > free:
        raise HumpbackError(
            f"the budget of {budget / GIB:.1f} GiB a device does not hold one row of {capacity} "
            f"tokens ({row / GIB:.2f} GiB) beside the weights ({weights / GIB:.1f} GiB) and the "
            f"prefill ({prefill_tokens * activations / GIB:.1f} GiB). Raise --memory-gb, spread "
            "the model over more devices (--mesh=tensor=...), lower --max-tokens, or shorten the "
            "prompts."
        )
    return rows
