"""Hugging Face model folders: `config.json` and safetensors files, read and written without torch.

Both directions hold one tensor at a time beside the parameters themselves. The format of a file
(8-byte header length, JSON header, raw bytes) is that of the safetensors project.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import Params
from humpback_jax.weights import names
from humpback_jax.weights.layout import assemble
from humpback_jax.weights.names import some_of
from humpback_jax.weights.outgoing import OutgoingTensor, outgoing_tensors
from humpback_jax.weights.stored import Slices, stored_params

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
BLOCK_ROWS = 4096  # of a table, read at a time to be compared
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def tensor_specs(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape (as stored, kernels [out, in]) of every tensor of the model."""
    return {tensor.hf: tensor.shape for tensor in names.file_tensors(config)}


def read_config(folder: Path) -> LlamaConfig:
    """Reads `config.json`.

    Raises:
      HumpbackError: it is absent, is not JSON, or describes a model that is not supported.
    """
    path = folder / "config.json"
    fields = _read_json(path)
    if quantised := fields.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise HumpbackError(
            f"{path}: quantization_config says that the weights are quantised ({method}); use the "
            "unquantised model, or a GGUF file, whose quantised weights are read."
        )
    return LlamaConfig.from_hf(fields, str(path))


def load_hf(folder: Path, config: LlamaConfig | None = None) -> tuple[LlamaConfig, Params]:
    """Reads a model folder, in one file or in shards with an index.

    Args:
      config: taken from the folder's `config.json` when None.

    Returns:
      The config and numpy arrays in the stored dtypes (float32, float16, bfloat16).

    Raises:
      HumpbackError: a tensor is missing, unexpected, mis-shaped, listed twice or of another dtype,
        or a file is absent, corrupt or cut off; the message names the file and the tensor.
    """
    folder = Path(folder)
    config = read_config(folder) if config is None else config
    with contextlib.ExitStack() as stack:
        stored = _open_tensors(folder, stack)
        _check_names(folder, config, stored)
        params = assemble(
            config, _leaf_dtypes(config, stored), lambda tensor: stored[tensor.hf].read()
        )
        _check_tied_head(config, stored)
    return config, params


def open_hf(folder: Path) -> tuple[LlamaConfig, Params]:
    """As `load_hf`, but the leaves are `StoredLeaf`: nothing is read before it is asked for.

    The files stay open as long as a leaf is in use.
    """
    config = read_config(folder)
    with contextlib.ExitStack() as stack:
        stored = _open_tensors(folder, stack)
        _check_names(folder, config, stored)
        _check_tied_head(config, stored)
        dtypes = _leaf_dtypes(config, stored)
        params = stored_params(config, dtypes, lambda tensor: stored[tensor.hf])
        stack.pop_all()
    return config, params


def save_hf(
    folder: Path,
    config: LlamaConfig,
    params: Params,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Writes a model folder that `transformers` loads to the same model.

    Files get their final names only after all of them are complete; weights that the folder held
    before are removed. Other files in the folder (a tokenizer) stay.

    Args:
      params: numpy or jax arrays, layers stacked or kept apart.
      dtype: "float32", "float16" or "bfloat16"; None keeps each array's own.
      max_shard_bytes: above this total, the weights are split into shards with an index.

    Returns:
      The weight files written.

    Raises:
      HumpbackError: `params` is not a complete, merged model of this config, or of another dtype.
    """
    folder = Path(folder)
    entries = outgoing_tensors(config, params, dtype)
    shards = _split(entries, max_shard_bytes)
    main_dtype = next(entry.dtype for entry in entries if entry.tensor.path[0] == "embed")
    files = [
        SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with _Replacement(folder) as replacement:
        for name, shard in zip(files, shards, strict=True):
            _write_file(replacement.temporary(name), shard)
        if len(shards) > 1:
            _write_json(replacement.temporary(INDEX_NAME), _index(files, shards))
        _write_json(replacement.temporary("config.json"), config.to_hf(main_dtype.name))
    return [folder / name for name in files]


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor in an open file."""

    file: Path
    name: str
    handle: Any
    shape: tuple[int, ...]
    code: str

    def read(self) -> np.ndarray:
        return self.handle.get_tensor(self.name)

    def part(self, slices: Slices) -> np.ndarray:
        """A rectangular part, which alone is read."""
        return self.handle.get_slice(self.name)[slices]


def _open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    """Opens every weight file of the folder and lists what they hold."""
    listed = _listed_files(folder)
    stored: dict[str, _Stored] = {}
    for file in sorted(set(listed.values())) if listed else [folder / SINGLE_NAME]:
        for tensor in _open_file(file, stack):
            if tensor.name in stored:
                raise HumpbackError(
                    f"{file}: the tensor {tensor.name!r} is also in {stored[tensor.name].file}; "
                    "remove one of the two files or rebuild the index."
                )
            stored[tensor.name] = tensor
    for name, file in listed.items():
        if name not in stored or stored[name].file != file:
            raise HumpbackError(
                f"{file}: the tensor {name!r}, which {INDEX_NAME} places here, is not in the file."
            )
    return stored


def _listed_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file by the index; empty where one file holds everything."""
    if (folder / SINGLE_NAME).exists():  # which transformers, too, prefers to an index
        return {}
    index = folder / INDEX_NAME
    if not index.exists():
        raise HumpbackError(
            f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME} is here. Only safetensors weights "
            "are read; a folder of *.bin files must be converted first."
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HumpbackError(f"{index}: the field 'weight_map' is missing or empty.")
    for name, file in weight_map.items():
        if not (folder / file).exists():
            raise HumpbackError(
                f"{index}: the file {file!r}, said to hold {name!r}, is missing from {folder}; "
                "fetch or copy it again."
            )
    return {name: folder / file for name, file in weight_map.items()}


def _open_file(file: Path, stack: contextlib.ExitStack) -> Iterator[_Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        handle = stack.enter_context(safe_open(file, framework="np"))
        for name in handle.keys():  # noqa: SIM118  (not a dict)
            part = handle.get_slice(name)
            yield _Stored(file, name, handle, tuple(part.get_shape()), part.get_dtype())
    except (SafetensorError, OSError) as error:
        raise HumpbackError(
            f"{file}: not a readable safetensors file ({error}). It may be incomplete: fetch or "
            "copy it again."
        ) from error


def _check_names(folder: Path, config: LlamaConfig, stored: Mapping[str, _Stored]) -> None:
    expected = tensor_specs(config)
    missing = [name for name in expected if name not in stored]
    if missing:
        raise HumpbackError(
            f"{folder}: {some_of(missing)} missing, by its config.json. Is the copy complete, and "
            "does the config belong to these weights?"
        )
    for name, tensor in stored.items():
        if name in expected:
            if tensor.shape != expected[name]:
                raise HumpbackError(
                    f"{tensor.file}: the tensor {name!r} has shape {list(tensor.shape)}, but by "
                    f"the config it is {list(expected[name])}."
                )
            if tensor.code not in _DTYPES:
                raise HumpbackError(
                    f"{tensor.file}: the tensor {name!r} has dtype {tensor.code}; supported: "
                    f"{', '.join(_DTYPES)}. Quantised weights are read from GGUF files only."
                )
        elif not _is_redundant(name, config):
            raise HumpbackError(
                f"{tensor.file}: unexpected tensor {name!r}; this is not a plain LLaMA of the "
                "given config (adapters must be merged first)."
            )


def _is_redundant(name: str, config: LlamaConfig) -> bool:
    tied_head = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith("rotary_emb.inv_freq")


def _check_tied_head(config: LlamaConfig, stored: Mapping[str, _Stored]) -> None:
    head = stored.get("lm_head.weight")
    if not config.tie_word_embeddings or head is None:
        return
    table = stored["model.embed_tokens.weight"]
    count = head.shape[0]
    starts = range(0, count, BLOCK_ROWS)
    blocks = [(slice(start, min(start + BLOCK_ROWS, count)),) for start in starts]
    same = head.shape == table.shape
    if not (same and all(np.array_equal(head.part(rows), table.part(rows)) for rows in blocks)):
        raise HumpbackError(
            f"{head.file}: the tensor 'lm_head.weight' differs from 'model.embed_tokens.weight', "
            "although config.json ties them; set tie_word_embeddings to false there to use it."
        )


def _leaf_dtypes(
    config: LlamaConfig, stored: Mapping[str, _Stored]
) -> dict[names.LeafPath, np.dtype]:
    found: dict[names.LeafPath, _Stored] = {}
    for tensor in names.file_tensors(config):
        this = stored[tensor.hf]
        first = found.setdefault(tensor.path, this)
        if this.code != first.code:
            raise HumpbackError(
                f"{this.file}: the tensor {this.name!r} is {this.code}, but {first.name!r} is "
                f"{first.code}; the layers of one model must agree."
            )
    return {path: _DTYPES[tensor.code] for path, tensor in found.items()}


def _split(entries: list[OutgoingTensor], max_bytes: int) -> list[list[OutgoingTensor]]:
    shards: list[list[OutgoingTensor]] = [[]]
    room = max_bytes
    for entry in entries:
        if shards[-1] and entry.size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(entry)
        room -= entry.size
    return shards


def _write_file(path: Path, entries: list[OutgoingTensor]) -> None:
    # Wider dtypes first, so that every tensor starts at a multiple of its item size.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        header[entry.tensor.hf] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.tensor.shape),
            "data_offsets": [position, position + entry.size],
        }
        position += entry.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for entry in entries:
            file.write(entry.values().reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _index(files: list[str], shards: list[list[OutgoingTensor]]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(entry.size for shard in shards for entry in shard)},
        "weight_map": {
            entry.tensor.hf: file
            for file, shard in zip(files, shards, strict=True)
            for entry in shard
        },
    }


class _Replacement:
    """Writes files under temporary names and gives them their own on success, or removes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def temporary(self, name: str) -> Path:
        self.names.append(name)
        return self._temporary(name)

    def _temporary(self, name: str) -> Path:
        return self.folder / f".{name}.{os.getpid()}.tmp"

    def __enter__(self) -> _Replacement:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            for name in self.names:
                self._temporary(name).unlink(missing_ok=True)
            return
        # The index goes first: shards without one are refused, so that a stop in between never
        # leaves a folder that loads as a mixture of two models.
        (self.folder / INDEX_NAME).unlink(missing_ok=True)
        shards = self.folder.glob("model-*-of-*.safetensors")
        for old in [self.folder / SINGLE_NAME, *shards]:
            if old.name not in self.names:
                old.unlink(missing_ok=True)
        for name in self.names:
            os.replace(self._temporary(name), self.folder / name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HumpbackError(f"{path}: the file is missing.") from error
    except (OSError, ValueError) as error:
        raise HumpbackError(f"{path}: not readable as JSON ({error}).") from error
    if not isinstance(parsed, dict):
        raise HumpbackError(f"{path}: a JSON object is expected, not {type(parsed).__name__}.")
    return parsed


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
