"""Weights read from their files onto a mesh: if these fail, each host reads the whole model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import from_torch, torch_llama

from humpback_jax.model.llama import flatten, unflatten
from humpback_jax.weights.hashing import corner_hash
from humpback_jax.weights.safetensors_io import load_hf, open_hf, save_hf

TESTS = Path(__file__).parent


@pytest.fixture(params=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64}
    config, params = from_torch(torch_llama(num_hidden_layers=3, **sizes))
    save_hf(tmp_path / "hf", config, params, request.param, max_shard_bytes=100_000)
    return tmp_path / "hf"


def test_a_stored_leaf_has_other_values_than_the_loaded_one(folder: Path) -> None:
    config, whole = load_hf(folder)
    again, stored = open_hf(folder)
    assert again == config
    loaded = flatten(whole)
    for path, leaf in flatten(stored).items():
        expected = loaded[path]
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
        assert np.array_equal(np.asarray(leaf), expected)
        part = tuple(slice(size // 3, size - size // 4) for size in leaf.shape)
        assert np.array_equal(leaf[part], expected[part])
        if path[0] == "layers":
            assert np.array_equal(np.asarray(leaf[2]), expected[2])
            assert np.array_equal(leaf[1][part[1:]], expected[1][part[1:]])


def test_a_resumed_run_cannot_tell_other_weights_of_one_name_apart(folder: Path) -> None:
    _, loaded = load_hf(folder)
    _, stored = open_hf(folder)
    assert (
        corner_hash(stored) == corner_hash(loaded) == corner_hash(jax.tree.map(jnp.array, loaded))
    )
    for path in flatten(loaded):
        changed = {**flatten(loaded)}
        changed[path] = changed[path] * 2 + 1
        assert corner_hash(unflatten(changed)) != corner_hash(loaded)
        if path[0] == "layers":
            changed[path] = flatten(loaded)[path].copy()
            changed[path][-1] += 1
            assert corner_hash(unflatten(changed)) != corner_hash(loaded), "the last layer alone"


MESHES = ["fsdp=8 scan", "fsdp=4,tensor=2 scan", "data=2,fsdp=2,tensor=2 unrolled"]


def test_a_mesh_reads_bytes_that_none_of_its_devices_holds(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64}
    config, params = from_torch(torch_llama(num_hidden_layers=2, **sizes))
    save_hf(tmp_path, config, jax.tree.map(np.asarray, params))
    done = subprocess.run(
        [sys.executable, "read_on_a_mesh.py", str(tmp_path), *MESHES],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("hash"), "a hash over stored weights is of other weights"
    for mesh, figures in found.items():
        assert figures["same"], mesh
        assert figures["read"] <= figures["held"], mesh
        assert figures["largest"] < figures["whole"] / 20, mesh
    assert found["fsdp=8 scan"]["read"] < 1.1 * found["fsdp=8 scan"]["whole"]
