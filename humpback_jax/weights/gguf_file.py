"""The header of a GGUF file (version 2 or 3, little-endian): metadata and tensor directory.

`gguf.GGUFReader` makes an array object of every string, 2 s for a vocabulary of 49,152, and loops
without end on a corrupt length. This reader takes a tenth of a second and checks every length
against the size of the file. Format: the GGUF specification in the ggml repository.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from humpback_jax.errors import HumpbackError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in the file.

    Attributes:
      shape: outermost dimension first, as in numpy (the file lists them the other way round).
      type_id: the number of its ggml type.
      start: position of its first byte in the file.
    """

    shape: tuple[int, ...]
    type_id: int
    start: int


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """Metadata values by key (arrays as lists) and tensor entries by name."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_gguf_header(path: str | Path) -> GgufHeader:
    """Reads everything that precedes the tensor data.

    Raises:
      HumpbackError: the file is absent, not GGUF, of an unknown version, corrupt or cut off.
    """
    try:
        with (
            Path(path).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _Cursor(data).header()
    except (OSError, ValueError, struct.error) as error:
        raise HumpbackError(
            f"{path}: not a readable GGUF file ({error}). It may be incomplete: fetch it again."
        ) from error


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def header(self) -> GgufHeader:
        magic = self._take(4)
        if magic != _MAGIC:
            raise ValueError(f"it starts with {magic!r} instead of {_MAGIC!r}")
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}; little-endian files of version 2 and 3 are known")
        tensor_count, pair_count = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._string()
            if key in metadata:
                raise ValueError(f"the key {key!r} occurs twice")
            metadata[key] = self._value(self._scalar("I"))
        entries: dict[str, TensorEntry] = {}
        for _ in range(tensor_count):
            name = self._string()
            if name in entries:
                raise ValueError(f"the tensor {name!r} occurs twice")
            entries[name] = self._entry(name)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"general.alignment is {alignment!r}")
        base = math.ceil(self.position / alignment) * alignment
        tensors = {
            name: dataclasses.replace(entry, start=base + entry.start)
            for name, entry in entries.items()
        }
        return GgufHeader(metadata, tensors)

    def _entry(self, name: str) -> TensorEntry:
        """A directory entry; `start` still counts from the beginning of the tensor data."""
        dims = self._scalar("I")
        if not 1 <= dims <= _MAX_DIMS:
            raise ValueError(f"the tensor {name!r} has {dims} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dims))[::-1]
        return TensorEntry(shape, type_id=self._scalar("I"), start=self._scalar("Q"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(self._code(kind))
        item, count = self._scalar("I"), self._scalar("Q")
        if item == _STRING:
            return [self._string() for _ in range(count)]
        dtype = np.dtype(self._code(item)).newbyteorder("<")
        return np.frombuffer(self._take(dtype.itemsize * count), dtype).tolist()

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"unknown metadata type {kind} before byte {self.position}")
        return _SCALARS[kind]

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode("utf-8")

    def _take(self, size: int) -> bytes:
        start = self.position
        self.position += size
        if self.position > len(self.data):
            raise ValueError(f"cut off: bytes {start} to {self.position} of {len(self.data)}")
        return self.data[start : self.position]
