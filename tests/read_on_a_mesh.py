"""A model folder read onto meshes, as JSON: `python read_on_a_mesh.py FOLDER MESH ...`.

A program of its own, because a process has as many CPU devices as it started with.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

from humpback_jax.model.linear import Precision
from humpback_jax.parallel.mesh import make_mesh, parse_mesh
from humpback_jax.training.optimizer import OptimizerSpec, make_optimizer
from humpback_jax.training.state import StepSpec, initial_state
from humpback_jax.weights.hashing import params_hash
from humpback_jax.weights.safetensors_io import load_hf, open_hf
from humpback_jax.weights.stored import StoredLeaf

read: list[int] = []
original = StoredLeaf._read


def counted(self: StoredLeaf, tensor: object, slices: tuple[slice, ...]) -> np.ndarray:
    piece = original(self, tensor, slices)
    read.append(piece.nbytes)
    return piece


StoredLeaf._read = counted

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    config, whole = load_hf(folder)
    found = {}
    for name in sys.argv[2:]:
        shape = parse_mesh(name.partition(" ")[0])
        mesh = make_mesh(shape, jax.devices())
        layout = name.partition(" ")[2]
        spec = StepSpec(config, 1, layout=layout, precision=Precision(), mesh=mesh)
        optimizer = make_optimizer(OptimizerSpec(), 1)
        expected = initial_state(spec, whole, optimizer, 0).trainable
        _, stored = open_hf(folder)
        read.clear()
        placed = initial_state(spec, stored, optimizer, 0).trainable
        leaves = jax.tree.leaves(placed)
        shards = [shard.data.size for leaf in leaves for shard in leaf.addressable_shards]
        itemsize = jax.tree.leaves(whole)[0].dtype.itemsize
        found[name] = {
            "read": sum(read),
            "held": sum(shards) * itemsize,
            "largest": max(read),
            "whole": sum(leaf.nbytes for leaf in jax.tree.leaves(whole)),
            "same": all(
                np.array_equal(a, b) for a, b in zip(leaves, jax.tree.leaves(expected), strict=True)
            ),
        }
    found["hash"] = params_hash(stored) == params_hash(whole)
    print(json.dumps(found))
