"""The tensors of a model on their way into a file, checked against its config."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import Params
from humpback_jax.weights.layout import LayerLeaf, layer_leaves
from humpback_jax.weights.names import FileTensor, file_tensors, some_of

WRITABLE = {
    dtype.name: dtype for dtype in map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16))
}


@dataclasses.dataclass(frozen=True)
class OutgoingTensor:
    """A tensor that a file is to hold as `dtype`."""

    tensor: FileTensor
    dtype: np.dtype
    leaf: LayerLeaf

    @property
    def size(self) -> int:
        """In bytes."""
        return int(np.prod(self.tensor.shape)) * self.dtype.itemsize

    def values(self) -> np.ndarray:
        """In the file's shape, contiguous."""
        values = self.leaf.numpy()
        values = values.T if self.tensor.transposed else values
        return np.ascontiguousarray(values, dtype=self.dtype)


def outgoing_tensors(
    config: LlamaConfig, params: Params, dtype: str | None
) -> list[OutgoingTensor]:
    """Every tensor of a file of this model, in the order of `file_tensors`.

    Args:
      params: numpy or jax arrays, layers stacked or kept apart.
      dtype: one of `WRITABLE`; None keeps each array's own.

    Raises:
      HumpbackError: `params` is not a complete, merged model of this config, or of another dtype.
    """
    leaves = layer_leaves(params)
    found = []
    for tensor in file_tensors(config):
        label = f"{'.'.join(tensor.path)} (layer {tensor.layer})"
        leaf = leaves.pop((tensor.path, tensor.layer), None)
        if leaf is None:
            raise HumpbackError(f"The parameters hold no {label}, which the config asks for.")
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        if leaf.shape != shape:
            raise HumpbackError(f"{label} has shape {leaf.shape}, but by the config {shape}.")
        stored_as = WRITABLE.get(dtype or leaf.dtype.name)
        if stored_as is None:
            raise HumpbackError(
                f"{label} cannot be written as {dtype or leaf.dtype}; files of weights hold one of "
                f"{', '.join(WRITABLE)}."
            )
        found.append(OutgoingTensor(tensor, stored_as, leaf))
    if leaves:
        extra = [".".join(path) for path, _ in leaves]
        raise HumpbackError(
            f"A file of weights has no place for {some_of(extra)} beyond the config's own; merge "
            "adapters first."
        )
    return found
