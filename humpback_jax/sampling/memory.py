"""How many rows fit: planned from a budget before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from humpback_jax.errors import HumpbackError
from humpback_jax.model.cache import cache_bytes
from humpback_jax.model.config import LlamaConfig
from humpback_jax.parallel.topology import GIB

KEPT_FREE = 0.1  # of the device's memory, for the compiler's own buffers
LOGITS = 5  # float32 arrays of [places, vocabulary] that drawing holds at a time


def device_bytes(device: Any, sharing: int = 1) -> int:
    """Memory that a plan may count on: the accelerator's, or a device's part of the machine's.

    What other programs take now is not considered: a job that is continued gets the same plan.

    Args:
      sharing: devices in use, where they are parts of one machine's CPU.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] * (1 - KEPT_FREE))
    return int(_machine_bytes() * (1 - KEPT_FREE) / sharing)


def _machine_bytes() -> int:
    """Of the machine, or of the control group that holds this process, if that is less."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return installed
    return min(installed, int(limit)) if limit.isdecimal() else installed


def tree_bytes(tree: Any) -> int:
    """Of arrays: what the fullest of our devices holds."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def parts_that_hold(weights: int, budget: int, most: int) -> int:
    """The fewest devices, by powers of two, on which weights leave half of the room for rows."""
    parts = 1
    while parts < most and 2 * weights > parts * budget:
        parts *= 2
    return parts


class NoRoom(HumpbackError):
    """A device's memory does not hold the weights and one row."""


def rows_that_fit(
    config: LlamaConfig,
    kv: str,
    capacity: int,
    wanted: int,
    budget: int,
    weights: int,
    prefill_tokens: int,
    tensor: int = 1,
    fsdp: int = 1,
    drafts: int = 0,
) -> int:
    """Rows that one copy of the model decodes together: `wanted`, or fewer by halves.

    Args:
      kv: dtype of the cache. capacity: places of a row in it.
      budget, weights: bytes of one device, and what the weights take of them.
      prefill_tokens: computed in one call. tensor: devices that share the key/value heads.
      fsdp: devices that share the caches' rows.
      drafts: tokens guessed in each step, for each of which a row has one more place in it.

    Raises:
      NoRoom: not even one row fits.
    """
    shared = tensor if config.num_key_value_heads % tensor == 0 else 1
    cached = cache_bytes(config, 1, capacity, kv) // shared
    drawn = (1 + drafts) * config.vocab_size * (4 * LOGITS + 1)
    activations = 4 * (6 * config.hidden_size + 3 * config.intermediate_size)
    free = budget - weights - prefill_tokens * activations
    rows = wanted

    def needed() -> int:
        return (rows // fsdp if rows % fsdp == 0 else rows) * cached + rows * drawn

    while rows > 1 and needed() > free:
        rows = (rows + 1) // 2
    if needed() > free:
        raise NoRoom(
            f"the budget of {budget / GIB:.1f} GiB a device does not hold one row of {capacity} "
            f"tokens ({needed() / GIB:.2f} GiB) beside the weights ({weights / GIB:.1f} GiB) and "
            f"the prefill ({prefill_tokens * activations / GIB:.1f} GiB). Raise --memory-gb, "
            "spread the model over more devices (--mesh=tensor=...), lower --max-tokens, or "
            "shorten the prompts."
        )
    return rows
