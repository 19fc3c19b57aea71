"""Artifacts of a run: content-addressed folders, atomic shards, skip-if-done, the manifest.

`store/KEY/` holds one artifact. Its key is the hash of the stage's version, of the config fields
that the stage reads and of its inputs' content; its hash is taken over its rows or arrays. A shard
is written under a temporary name and renamed; the artifact is done when its `artifact.json`
exists, which is written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
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
        self._names: list[str] = []
        try:
            (root / "store").mkdir(parents=True, exist_ok=True)
            probe = root / "store" / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise HumpbackError(
                f"the run folder {root} cannot be written ({error.strerror}). Choose another "
                "--workdir, or mend its permissions."
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
    ) -> Artifact:
        """An artifact of rows, made shard by shard; finished shards are not made again.

        Args:
          make: shard index -> its rows; must depend on nothing but the stage and its parents.
          details: a summary of all rows for the manifest.
        """

        def build(folder: Path) -> tuple[str, int, Row]:
            everything: list[Row] = []
            for index in range(shards):
                path = folder / f"part-{index:05d}.parquet"
                if not path.exists():
                    write_parquet(path, make(index))
                everything.extend(read_parquet(path))
            return rows_hash(everything), len(everything), details(everything)

        return self._artifact(name, kind, stage, parents, build)

    def model(
        self,
        name: str,
        stage: Stage,
        parents: Sequence[Artifact],
        make: Callable[[Path], tuple[str, Row]],
    ) -> Artifact:
        """A model artifact; `make` fills the folder and returns (content hash, details)."""

        def build(folder: Path) -> tuple[str, int, Row]:
            digest, details = make(folder)
            return digest, 0, details

        return self._artifact(name, "model", stage, parents, build)

    def _artifact(
        self,
        name: str,
        kind: str,
        stage: Stage,
        parents: Sequence[Artifact],
        build: Callable[[Path], tuple[str, int, Row]],
    ) -> Artifact:
        key = stage.key(parents)
        folder = self._folder(key)
        seal = folder / "artifact.json"
        if seal.exists():
            record = json.loads(seal.read_text())
            self._say(f"{name}: already done, {record['hash'][:12]}")
        else:
            self.redone += 1
            started = time.monotonic()
            folder.mkdir(parents=True, exist_ok=True)
            digest, rows, details = build(folder)
            self._say(f"{name}: done in {time.monotonic() - started:.1f} s")
            record = {"hash": digest, "rows": rows, "details": details}
            record |= {"stage": stage.name, "version": stage.version, "fields": stage.fields}
            write_json(seal, record)
        artifact = Artifact(
            name,
            kind,
            key,
            record["hash"],
            tuple(parent.hash for parent in parents),
            record["rows"],
            str(folder.relative_to(self.root)),
            stage.name,
            stage.fields,
            record["details"],
        )
        self._enter(artifact)
        return artifact

    def _folder(self, key: str) -> Path:
        """The newest attempt at this key; a fresh run starts a new one and leaves the old."""
        if key not in self._touched:
            attempts = sorted(
                (self.root / "store").glob(f"{key}*"), key=lambda path: (len(path.name), path.name)
            )
            newest = attempts[-1] if attempts else self.root / "store" / key
            if self._fresh and attempts:
                newest = self.root / "store" / f"{key}-{len(attempts)}"
            self._touched[key] = newest
        return self._touched[key]

    def _enter(self, artifact: Artifact) -> None:
        entries = {entry["name"]: entry for entry in read_manifest(self.root)}
        entries[artifact.name] = artifact.record()
        self._names.append(artifact.name)
        write_json(self.root / "manifest.json", {"artifacts": list(entries.values())})

    def finish(self) -> None:
        """Drops the names that this run did not produce or reuse from the manifest."""
        entries = [e for e in read_manifest(self.root) if e["name"] in self._names]
        entries.sort(key=lambda entry: self._names.index(entry["name"]))
        write_json(self.root / "manifest.json", {"artifacts": entries})

    def read(self, artifact: Artifact) -> list[Row]:
        return artifact_rows(self.root / artifact.path)


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
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
