"""The identity of a set of weights: a hash over their content alone."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from humpback_jax.model.llama import Params
from humpback_jax.weights.layout import LayerLeaf, LeafKey, layer_leaves


def params_hash(params: Params) -> str:
    """SHA-256 (hex) over the name, dtype, shape and bytes of every parameter.

    Equal values give an equal hash, whether they are numpy or jax arrays, on one device or
    sharded over several, stacked over layers or kept apart, and in whatever order they come.
    Every array must be addressable from this process.
    """
    leaves = sorted(layer_leaves(params).items(), key=lambda item: _label(item[0]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib releases the interpreter lock
        digests = pool.map(lambda item: _leaf_digest(*item), leaves)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _leaf_digest(key: LeafKey, leaf: LayerLeaf) -> bytes:
    header = f"{_label(key)} {leaf.dtype} {leaf.shape}\n"
    digest = hashlib.sha256(header.encode())
    digest.update(np.ascontiguousarray(leaf.numpy()).reshape(-1).view(np.uint8).data)
    return digest.digest()


def _label(key: LeafKey) -> str:
    path, layer = key
    return ".".join(path) if layer is None else f"{layer}:{'.'.join(path)}"
