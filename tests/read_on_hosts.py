"""Lays a batch out on the devices of several processes, and says which examples this one read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from humpback_jax.parallel.mesh import MeshShape, make_mesh
from humpback_jax.parallel.processes import join_processes
from humpback_jax.training.examples import TrainingExample, index_of
from humpback_jax.training.order import BatchOrder
from humpback_jax.training.packing import packed_rows, place_batch, plan_packing


class Watched(Sequence[TrainingExample]):
    """Examples that remember which of them were read."""

    def __init__(self, examples: Sequence[TrainingExample]) -> None:
        self.examples = examples
        self.read: set[int] = set()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: Any) -> Any:
        self.read.add(place)
        return self.examples[place]


def examples_of(count: int) -> list[TrainingExample]:
    generator = np.random.default_rng(0)
    ids = [np.arange(generator.integers(20, 120), dtype=np.int32) + 1000 * i for i in range(count)]
    return [TrainingExample(str(i), each, each >= 0) for i, each in enumerate(ids)]


if __name__ == "__main__":
    join_processes()
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2), jax.devices())
    examples = examples_of(64)
    index = index_of(examples)
    order = BatchOrder(index.keys, 48, 0)
    plan = plan_packing(index, order, 1, 256, 2, parts=4)
    rows = packed_rows(index, order.indices(0), plan)
    watched = Watched(examples)
    placed = place_batch(watched, rows, plan, index.names, mesh)
    whole = place_batch(examples, rows, plan, index.names, None)
    same = all(
        np.array_equal(shard.data, known[shard.index])
        for field, known in zip(placed, whole, strict=True)
        for shard in field.addressable_shards
    )
    batch = order.indices(0).tolist()
    print(json.dumps({"read": sorted(watched.read), "batch": batch, "same": same}))
