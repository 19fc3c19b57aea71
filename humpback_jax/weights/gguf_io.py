"""Reads LLaMA weights from GGUF files, the format of llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import Params
from humpback_jax.weights.gguf_config import ROPE_FACTORS, config_from_gguf
from humpback_jax.weights.gguf_file import GgufHeader, TensorEntry, read_gguf_header
from humpback_jax.weights.layout import assemble
from humpback_jax.weights.names import FileTensor, LeafPath, file_tensors, leaf_shapes


def load_gguf(path: Path, dtype: str = "float32") -> tuple[LlamaConfig, Params]:
    """Reads a GGUF file of the LLaMA family, dequantising every tensor.

    Args:
      dtype: of the returned numpy arrays.

    Raises:
      HumpbackError: not a GGUF file, cut off, another architecture, a tensor missing, unexpected,
        mis-shaped or of a type that the gguf library cannot dequantise.
    """
    path = Path(path)
    header = read_gguf_header(path)
    data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    config = _config(path, header, data)
    tensors = {name: entry for name, entry in header.tensors.items() if name != ROPE_FACTORS}
    _check_tensors(path, config, tensors)

    def read(tensor: FileTensor) -> np.ndarray:
        values = _values(path, tensor.gguf, tensors[tensor.gguf], data)
        heads = rotated_heads(config, tensor)
        return values if heads is None else _to_rotate_half(values, heads)

    dtypes = dict.fromkeys(leaf_shapes(config), np.dtype(dtype))
    return config, assemble(config, dtypes, read)


def read_gguf_config(path: Path) -> LlamaConfig:
    """The model that a GGUF file holds, whose weights are not read.

    Raises:
      HumpbackError: not a GGUF file, or a model that is not supported.
    """
    header = read_gguf_header(path)  # which refuses a file that is none
    return _config(path, header, np.memmap(path, np.uint8, mode="r").view(np.ndarray))


def _config(path: Path, header: GgufHeader, data: np.ndarray) -> LlamaConfig:
    stored = header.tensors.get(ROPE_FACTORS)
    factors = None if stored is None else _values(path, ROPE_FACTORS, stored, data)
    return config_from_gguf(path, header, factors)


def rotated_heads(config: LlamaConfig, tensor: FileTensor) -> int | None:
    """Number of heads in a tensor whose rows llama.cpp has in another order; None of others."""
    of_module: dict[LeafPath, int] = {
        ("layers", "attn", "q"): config.num_attention_heads,
        ("layers", "attn", "k"): config.num_key_value_heads,
    }
    return of_module.get(tensor.path[:-1])


def _values(path: Path, name: str, entry: TensorEntry, data: np.ndarray) -> np.ndarray:
    """One tensor, dequantised to float32, in the shape of its entry."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        kind = GGMLQuantizationType(entry.type_id)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise HumpbackError(
            f"{path}: the tensor {name!r} has the ggml type {entry.type_id}, which is unknown; a "
            "newer gguf library may know it."
        ) from error
    if entry.shape[-1] % block:
        raise HumpbackError(
            f"{path}: the rows of {name!r} have {entry.shape[-1]} values, no multiple of the "
            f"{block} in a block of {kind.name}; the file is corrupt."
        )
    row_bytes = entry.shape[-1] // block * block_bytes
    end = entry.start + math.prod(entry.shape[:-1]) * row_bytes
    if end > data.size:
        raise HumpbackError(
            f"{path}: the tensor {name!r} ends at byte {end}, but the file has {data.size}; it is "
            "incomplete: fetch it again."
        )
    try:
        raw = data[entry.start : end].reshape(*entry.shape[:-1], row_bytes)
        return dequantize(raw, kind)
    except NotImplementedError as error:
        raise HumpbackError(
            f"{path}: the tensor {name!r} is of type {kind.name}, which the gguf library cannot "
            "dequantise; use a file in another quantisation."
        ) from error


def _to_rotate_half(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of the q and k rows (or biases) within each head.

    llama.cpp rotates neighbouring pairs (2i, 2i + 1); we, as Hugging Face, rotate (i, i + K/2).
    """
    by_pair = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return by_pair.swapaxes(1, 2).reshape(rows.shape)


def _check_tensors(path: Path, config: LlamaConfig, tensors: Mapping[str, TensorEntry]) -> None:
    expected = {tensor.gguf: tensor.shape for tensor in file_tensors(config)}
    for name, shape in expected.items():
        if name not in tensors:
            raise HumpbackError(f"{path}: the tensor {name!r} is missing.")
        if tensors[name].shape != shape:
            raise HumpbackError(
                f"{path}: the tensor {name!r} has shape {list(tensors[name].shape)}, but by the "
                f"metadata it is {list(shape)}."
            )
    for name in tensors:
        if name not in expected:
            raise HumpbackError(f"{path}: unexpected tensor {name!r}; this is not a plain LLaMA.")
