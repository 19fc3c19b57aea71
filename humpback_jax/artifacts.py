"""Artifacts of a run: content-addressed folders, atomic shards, skip-if-done, the manifest.

`store/KEY/` holds one artifact. Its key is the hash of the stage's version, of the config fields
that the stage reads and of its inputs' content; its hash is taken over its rows or arrays. A shard
is written under a temporary name and renamed; the artifact is done when its `artifact.json`
exists, which is written last. How rows are cut into shards stands in `layout.json`, not in the key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from humpback_jax.errors import HumpbackError

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A finished artifact. `path` is relative to the run folder; `rows` is 0 for models."""

    name: str
    kind: str
    key: str
    hash: str
    parents: tuple[str, ...]
    rows: int
    path: str
    stage: str
    fields: Row
    details: Row

    def record(self) -> Row:
        """The manifest's entry."""
        return {**dataclasses.asdict(self), "parents": list(self.parents), "status": "done"}


@dataclasses.dataclass(frozen=True)
class Stage:
    """What identifies the work: name, version of its code, and the fields that it reads."""

    name: str
    version: int
    fields: Row

    def key(self, parents: Sequence[Artifact | str]) -> str:
        inputs = [parent if isinstance(parent, str) else parent.hash for parent in parents]
        content = [self.name, self.version, self.fields, inputs]
        return json_hash(content)[:16]


class RunFolder:
    """The folder of a run: `store/`, `manifest.json`, `resume/`, logs and report."""

    def __init__(self, root: Path, *, fresh: bool = False, say: Callable[[str], None] = print):
        self.root, self._fresh, self._say = root, fresh, say
        self._touched: dict[str, Path] = {}
        self._entered: list[Artifact] = []
        try:
            (root / "store").mkdir(parents=True, exist_ok=True)
            probe = root / "store" / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise HumpbackError(
                f"the run folder {root} cannot be written ({error.strerror}). Choose another "
                "--workdir, or fix its permissions."
            ) from error
        self.redone = 0

    def rows(
        self,
        name: str,
        kind: str,
        stage: Stage,
        parents: Sequence[Artifact],
        shards: int,
        make: Callable[[int], Iterable[Row]],
        details: Callable[[list[Row]], Row] = lambda rows: {},
        shard_rows: int = 0,
    ) -> Artifact:
        """An artifact of rows, one shard after another; see `streamed`.

        Args:
          make: shard index -> its rows; must depend on nothing but the stage and its parents.
        """

        def one_by_one(missing: Sequence[int]) -> Iterator[tuple[int, Iterable[Row]]]:
            return ((index, make(index)) for index in missing)

        return self.streamed(name, kind, stage, parents, shards, one_by_one, details, shard_rows)

    def streamed(
        self,
        name: str,
        kind: str,
        stage: Stage,
        parents: Sequence[Artifact],
        shards: int,
        make: Callable[[Sequence[int]], Iterator[tuple[int, Iterable[Row]]]],
        details: Callable[[list[Row]], Row] = lambda rows: {},
        shard_rows: int = 0,
    ) -> Artifact:
        """An artifact of rows in shards; finished ones are kept, and not made again.

        Args:
          make: indices of the missing shards, one at least -> (index, rows) of each, in any
            order; rows must depend on nothing but the stage and its parents.
          details: a summary of all rows for the manifest.
          shard_rows: how many rows of the input go into a shard, where that can be chosen; shards
            of an unfinished artifact that were cut another way are made again.
        """
        layout = {"shards": shards, "shard_rows": shard_rows}

        def build(folder: Path) -> tuple[str, int, Row]:
            if _layout(folder) != layout:
                for stale in folder.glob("part-*.parquet"):
                    stale.unlink()
                write_json(folder / "layout.json", layout)
            parts = _parts(folder, shards)
            missing = [index for index, path in enumerate(parts) if not path.exists()]
            for index, rows in make(missing) if missing else ():
                write_parquet(parts[index], rows)
            everything = [row for path in parts for row in read_parquet(path)]
            return rows_hash(everything), len(everything), details(everything)

        def complete(folder: Path) -> bool:
            parts = _parts(folder, int(_layout(folder).get("shards", 1)))
            return all(path.exists() for path in parts)

        return self._artifact(name, kind, stage, parents, build, complete)

    def model(
        self,
        name: str,
        stage: Stage,
        parents: Sequence[Artifact],
        make: Callable[[Path], tuple[str, Row]],
        complete: Callable[[Path], bool],
    ) -> Artifact:
        """A model artifact; `make` fills the folder and returns (content hash, details).

        Args:
          complete: whether a sealed folder still holds all its files; if not, it is made again.
        """

        def build(folder: Path) -> tuple[str, int, Row]:
            digest, details = make(folder)
            return digest, 0, details

        return self._artifact(name, "model", stage, parents, build, complete)

    def _artifact(
        self,
        name: str,
        kind: str,
        stage: Stage,
        parents: Sequence[Artifact],
        build: Callable[[Path], tuple[str, int, Row]],
        complete: Callable[[Path], bool],
    ) -> Artifact:
        key = stage.key(parents)
        folder = self._folder(key)
        seal = folder / "artifact.json"
        if seal.exists() and complete(folder):
            with _undamaged(seal, "the artifact is then finished again"):
                record = json.loads(seal.read_text("utf-8"))
                digest, rows, details = record["hash"], record["rows"], record["details"]
            self._say(f"{name}: already done, {digest[:12]}")
        else:
            self.redone += 1
            started = time.monotonic()
            folder.mkdir(parents=True, exist_ok=True)
            digest, rows, details = build(folder)
            seconds = round(time.monotonic() - started, 1)
            self._say(f"{name}: done in {seconds:.1f} s")
            record = {"hash": digest, "rows": rows, "details": details, "seconds": seconds}
            record |= {"stage": stage.name, "version": stage.version, "fields": stage.fields}
            write_json(seal, record)
        artifact = Artifact(
            name,
            kind,
            key,
            digest,
            tuple(parent.hash for parent in parents),
            rows,
            str(folder.relative_to(self.root)),
            stage.name,
            stage.fields,
            details,
        )
        self._enter(artifact)
        return artifact

    def _folder(self, key: str) -> Path:
        """The newest attempt at this key; a fresh run starts a new one and leaves the old."""
        if key not in self._touched:
            first = self.root / "store" / key
            found = [path for path in (first, *first.parent.glob(f"{key}-*")) if path.exists()]
            attempts = {_attempt(path.name): path for path in found}
            newest = max(attempts, default=0)
            if self._fresh and attempts:
                self._touched[key] = first.with_name(f"{key}-{newest + 1}")
            else:
                self._touched[key] = attempts.get(newest, first)
        return self._touched[key]

    def _enter(self, artifact: Artifact) -> None:
        self._entered.append(artifact)
        entries = [entered.record() for entered in self._entered]
        write_json(self.root / "manifest.json", {"artifacts": entries})

    def read(self, artifact: Artifact) -> list[Row]:
        """All rows of a finished artifact.

        Raises:
          HumpbackError: a shard is damaged or missing.
        """
        rows = artifact_rows(self.root / artifact.path)
        if len(rows) != artifact.rows:
            raise HumpbackError(
                f"{self.root / artifact.path} holds {len(rows)} rows, not {artifact.rows}. Delete "
                "that folder and run again: only it is redone."
            )
        return rows


def _attempt(folder_name: str) -> int:
    """0 for `KEY`, n for `KEY-n`."""
    number = folder_name.partition("-")[2]
    return int(number) if number.isdecimal() else 0


def _parts(folder: Path, shards: int) -> list[Path]:
    return [folder / f"part-{index:05d}.parquet" for index in range(shards)]


def _layout(folder: Path) -> Row:
    """How the rows of an artifact are cut; {} where it has none yet."""
    path = folder / "layout.json"
    with _undamaged(path, "the artifact's shards are then made again"):
        return json.loads(path.read_text("utf-8")) if path.exists() else {}


@contextlib.contextmanager
def _undamaged(path: Path, meaning: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HumpbackError(
            f"{path} cannot be read ({error!r}). Delete it and run again; {meaning}."
        ) from error


def artifact_rows(folder: Path) -> list[Row]:
    """All rows of a finished artifact, in order."""
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in read_parquet(path)]


def read_manifest(root: Path) -> list[Row]:
    """The manifest's artifacts, [] where there is none yet."""
    path = root / "manifest.json"
    return json.loads(path.read_text())["artifacts"] if path.exists() else []


def rows_hash(rows: Iterable[Row]) -> str:
    """sha256 over the rows' canonical JSON, one a line."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical_json(row).encode() + b"\n")
    return digest.hexdigest()


def json_hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def write_json(path: Path, value: Any) -> None:
    """Atomic: readers see the old file or the new one."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    _atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_parquet(path: Path, rows: Iterable[Row]) -> None:
    """One shard, zstd-compressed, written atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows))
    _atomically(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path).read().to_pylist()
    except Exception as error:
        raise HumpbackError(
            f"{path} cannot be read ({error}). Delete that file and run again: only it is redone."
        ) from error


def _atomically(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise HumpbackError(
            f"{path} cannot be written ({error.strerror or error}). Make room or fix the "
            "permissions, then run again: what is finished is kept."
        ) from error
