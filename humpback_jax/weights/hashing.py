"""The identity of a set of weights: a hash over their content alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from humpback_jax.model.llama import Params, flatten
from humpback_jax.weights.layout import LayerLeaf, LeafKey, layer_leaves

CORNER = 8


def params_hash(params: Params) -> str:
    """SHA-256 (hex) over the name, dtype, shape and bytes of every parameter.

    Equal values give an equal hash, whether they are numpy or jax arrays, on one device or
    sharded over several, stacked over layers or kept apart, and in whatever order they come.
    Processes that hold the arrays together call it together; each then has one layer's leaf at a
    time beside its own share.
    """
    leaves = sorted(layer_leaves(params).items(), key=lambda item: _label(item[0]))
    if not all(leaf.is_here for _, leaf in leaves):  # all processes fetch the same one
        return _joined(_leaf_digest(key, leaf) for key, leaf in leaves)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib releases the interpreter lock
        return _joined(pool.map(lambda item: _leaf_digest(*item), leaves))


def corner_hash(params: Params) -> str:
    """SHA-256 (hex) over some values of every parameter, for telling models of one name apart.

    Of every layer's leaves, at most `CORNER` numbers along each dimension: little is read of
    weights that lie in files (`weights/stored.py`). Models that differ elsewhere alone look equal.

    Args:
      params: stacked by layer.
    """
    digest = hashlib.sha256()
    for path, leaf in flatten(params).items():
        sizes = [min(size, CORNER) for size in leaf.shape]
        if path[0] == "layers":
            sizes[0] = leaf.shape[0]
        corner = np.asarray(leaf[tuple(map(slice, sizes))])
        digest.update(f"{'.'.join(path)} {leaf.shape}\n".encode())
        digest.update(corner.astype(np.float32).tobytes())
    return digest.hexdigest()


def _joined(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _leaf_digest(key: LeafKey, leaf: LayerLeaf) -> bytes:
    header = f"{_label(key)} {leaf.dtype} {leaf.shape}\n"
    digest = hashlib.sha256(header.encode())
    digest.update(np.ascontiguousarray(leaf.numpy()).reshape(-1).view(np.uint8).data)
    return digest.digest()


def _label(key: LeafKey) -> str:
    path, layer = key
    return ".".join(path) if layer is None else f"{layer}:{'.'.join(path)}"
