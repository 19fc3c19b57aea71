"""Parameters that stay in their files: a piece is read when it is asked for, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import Params, unflatten
from humpback_jax.weights.names import FileTensor, LeafPath, file_tensors, leaf_shapes

Slices = tuple[slice, ...]


class Readable(Protocol):
    """A tensor in an open file."""

    def part(self, slices: Slices) -> np.ndarray:
        """A rectangular part of it, which alone is read."""
        ...


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """A leaf of the parameter tree; indexing it reads that part of it from the files.

    Attributes:
      tensors: one a layer, or the only one of a leaf that is not stacked.
      transposed: whether the files' rows are our columns.
    """

    tensors: Sequence[Readable]
    shape: tuple[int, ...]
    dtype: np.dtype
    transposed: bool
    stacked: bool

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, index: Any) -> Any:
        """One layer's leaf, still stored, by its number; values by a slice for each dimension."""
        if isinstance(index, int):
            layer = dataclasses.replace(self, tensors=(self.tensors[index],), stacked=False)
            return dataclasses.replace(layer, shape=self.shape[1:])
        if not self.stacked:
            return self._read(self.tensors[0], index)
        return np.stack([self._read(tensor, index[1:]) for tensor in self.tensors[index[0]]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[tuple(slice(None) for _ in self.shape)].astype(dtype or self.dtype, copy=False)

    def _read(self, tensor: Readable, slices: Slices) -> np.ndarray:
        return tensor.part(slices[::-1]).T if self.transposed else tensor.part(slices)


def stored_params(
    config: LlamaConfig,
    dtypes: dict[LeafPath, np.dtype],
    find: Callable[[FileTensor], Readable],
) -> Params:
    """The parameter tree, stacked by layer, of leaves that are read when they are asked for."""
    shapes = leaf_shapes(config)
    tensors: dict[LeafPath, list[FileTensor]] = {}
    for tensor in file_tensors(config):
        tensors.setdefault(tensor.path, []).append(tensor)
    return unflatten(
        {
            path: StoredLeaf(
                [find(tensor) for tensor in found],
                shapes[path],
                dtypes[path],
                found[0].transposed,
                found[0].layer is not None,
            )
            for path, found in tensors.items()
        }
    )
