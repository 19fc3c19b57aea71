"""Between the tensors of a file, one per layer, and the parameter tree, stacked over layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import Params, flatten, unflatten
from humpback_jax.parallel.processes import on_host
from humpback_jax.weights.names import FileTensor, LeafPath, file_tensors, leaf_shapes

LeafKey = tuple[LeafPath, int | None]


def assemble(
    config: LlamaConfig,
    dtypes: dict[LeafPath, np.dtype],
    read: Callable[[FileTensor], np.ndarray],
) -> Params:
    """Builds the parameter tree in numpy, holding one file tensor at a time beside it.

    Args:
      dtypes: path of each leaf -> its dtype.
      read: gives the contents of one file tensor, in the file's shape and the leaf's dtype.
    """
    leaves = {path: np.empty(shape, dtypes[path]) for path, shape in leaf_shapes(config).items()}
    for tensor in file_tensors(config):
        value = read(tensor)
        place = leaves[tensor.path]
        place[... if tensor.layer is None else tensor.layer] = (
            value.T if tensor.transposed else value
        )
    return unflatten(dict(leaves))


@dataclasses.dataclass(frozen=True)
class LayerLeaf:
    """One layer's part of a leaf, or a whole leaf outside the layers; fetched when asked for."""

    source: Any
    index: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape if self.index is None else self.source.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.source.dtype)

    @property
    def is_here(self) -> bool:
        """Whether this process holds all of it."""
        return not isinstance(self.source, jax.Array) or self.source.is_fully_addressable

    def numpy(self) -> np.ndarray:
        """The values on the host: a view where they already lie there, else a copy.

        Processes that hold the leaf together call it together.
        """
        return np.asarray(on_host(self.source if self.index is None else self.source[self.index]))


def layer_leaves(params: Params) -> dict[LeafKey, LayerLeaf]:
    """(path, layer) -> leaf, the same for stacked layers and for layers kept apart.

    Args:
      params: numpy or jax arrays; layers as `layers.X` [L, ...] or as `layers.i.X` [...].
    """
    found: dict[LeafKey, LayerLeaf] = {}
    for path, leaf in flatten(params).items():
        leaf = _on_host(leaf)
        if path[0] != "layers":
            found[path, None] = LayerLeaf(leaf, None)
        elif str(path[1]).isdecimal():
            found[("layers", *path[2:]), int(path[1])] = LayerLeaf(leaf, None)
        else:
            for layer in range(leaf.shape[0]):
                found[path, layer] = LayerLeaf(leaf, layer)
    return found


def _on_host(leaf: Any) -> Any:
    # On the CPU this is a view, and slicing it copies nothing. From an accelerator it would fetch,
    # and keep, a second copy of the whole stack; there each layer is sliced first.
    if isinstance(leaf, jax.Array):
        devices = leaf.devices()
        if len(devices) == 1 and next(iter(devices)).platform == "cpu":
            return np.asarray(leaf)
    return leaf
