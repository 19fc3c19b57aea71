"""Tokenised examples on disk, in shards: written once as rows stream by, read by index.

A shard is a folder. It is written under another name and renamed, so that one that exists is whole:

    tokens.u32   the examples' tokens, end to end; the highest bit says whether one is supervised
    rows.npy     for each example its key, supervised tokens, and where its tokens and its id end
    ids.txt      the ids, end to end
    counts.json  examples, tokens, rows dropped by reason, and a hash of the content

Tokens are memory-mapped: however large a store is, only the index is in memory.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.text.tokenize import TokenizedBatch
from humpback_jax.training.examples import (
    ExampleIndex,
    IndexedExamples,
    TrainingExample,
    distinct,
    example_key,
    numbered,
)

ROW = np.dtype([("key", "<u8"), ("end", "<u8"), ("id_end", "<u4"), ("supervised", "<u4")])
SUPERVISED = 31  # the bit of a word
UNMARKED = np.uint32((1 << SUPERVISED) - 1)
TOKENS, ROWS, IDS, COUNTS = "tokens.u32", "rows.npy", "ids.txt", "counts.json"


def write_shard(folder: Path, source: str, batches: Iterable[TokenizedBatch]) -> None:
    """Writes examples as they come; holds none but those of one batch.

    Raises:
      HumpbackError: the place cannot be written.
    """
    # In containers, the processes of a job have the same number.
    temporary = folder.with_name(f".{folder.name}.{jax.process_index()}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _fill(temporary, source, batches)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process has made the same one
                raise
    except OSError as error:
        raise HumpbackError(f"{folder} cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(folder: Path, source: str, batches: Iterable[TokenizedBatch]) -> None:
    digest, dropped = hashlib.sha256(), collections.Counter[str]()
    rows, end, id_end = [], 0, 0
    with open(folder / TOKENS, "wb") as tokens, open(folder / IDS, "wb") as ids:
        for batch in batches:
            dropped.update(batch.drop_counts())
            for example in batch.examples:
                words = example.ids.astype("<u4") | (example.mask.astype("<u4") << SUPERVISED)
                name = example.id.encode()
                end, id_end = end + len(words), id_end + len(name)
                key, supervised = example_key(source, example.id), example.mask[1:].sum()
                rows.append((key, end, id_end, supervised))
                for file, data in ((tokens, words.tobytes()), (ids, name)):
                    file.write(data)
                    digest.update(data)
    table = np.array(rows, ROW)
    np.save(folder / ROWS, table)
    counts = {
        "source": source,
        "examples": len(table),
        "tokens": end,
        "dropped": dict(dropped),
        "hash": hashlib.sha256(digest.digest() + table.tobytes()).hexdigest(),
    }
    (folder / COUNTS).write_text(json.dumps(counts), encoding="utf-8")


class TokenStore(IndexedExamples):
    """The examples of some shards, one shard after another.

    Attributes:
      columns: of all examples. dropped: rows left out, by reason. hash: of the content.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        """Raises HumpbackError where a shard is damaged."""
        self._shards = [_Shard(folder) for folder in shards]
        sizes = [len(shard) for shard in self._shards]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        names, sources = numbered([str(shard.counts["source"]) for shard in self._shards])
        self.columns = ExampleIndex(
            distinct(np.concatenate([shard.rows["key"] for shard in self._shards])),
            np.concatenate([shard.lengths for shard in self._shards]),
            np.concatenate([shard.rows["supervised"].astype(np.int32) for shard in self._shards]),
            np.repeat(sources, sizes),
            names,
        )
        self.dropped = collections.Counter[str]()
        for shard in self._shards:
            self.dropped.update(shard.counts["dropped"])
        hashes = "".join(str(shard.counts["hash"]) for shard in self._shards)
        self.hash = hashlib.sha256(hashes.encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._first[-1])

    @overload
    def __getitem__(self, place: int) -> TrainingExample: ...
    @overload
    def __getitem__(self, place: slice) -> list[TrainingExample]: ...
    def __getitem__(self, place: int | slice) -> TrainingExample | list[TrainingExample]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        place = range(len(self))[place]  # counts from the end, and raises IndexError
        number = int(np.searchsorted(self._first, place, side="right")) - 1
        return self._shards[number].example(place - int(self._first[number]))


class _Shard:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None
        try:
            self.counts: dict[str, Any] = json.loads((folder / COUNTS).read_text("utf-8"))
            self.rows = np.load(folder / ROWS, mmap_mode="r" if self.counts["examples"] else None)
            expected = [self.rows["end"][-1] * 4, self.rows["id_end"][-1]] if len(self) else [0, 0]
            found = [(folder / name).stat().st_size for name in (TOKENS, IDS)]
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise _damaged(folder, str(error)) from error
        if found != expected or len(self) != self.counts["examples"]:
            raise _damaged(folder, f"{found} bytes instead of {expected}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """int32 [n]: places in a row."""
        return (np.diff(self.rows["end"], prepend=np.uint64(0)).astype(np.int64) - 1).astype("i4")

    def example(self, place: int) -> TrainingExample:
        if self._arrays is None:
            tokens = np.memmap(self._folder / TOKENS, "<u4", "r").view(np.ndarray)
            self._arrays = tokens, np.memmap(self._folder / IDS, np.uint8, "r").view(np.ndarray)
        tokens, ids = self._arrays
        words = tokens[self._end("end", place - 1) : self._end("end", place)]
        name = ids[self._end("id_end", place - 1) : self._end("id_end", place)]
        return TrainingExample(
            name.tobytes().decode(),
            (words & UNMARKED).astype(np.int32),
            (words >> SUPERVISED).astype(bool),
            str(self.counts["source"]),
        )

    def _end(self, field: str, place: int) -> int:
        return int(self.rows[field][place]) if place >= 0 else 0


def _damaged(folder: Path, why: str) -> HumpbackError:
    return HumpbackError(f"{folder} is damaged ({why}). Delete that folder, and run again.")
