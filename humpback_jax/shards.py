"""Output of a long job: shards written one by one, kept over a restart, joined at the end."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from humpback_jax.artifacts import write_json
from humpback_jax.errors import HumpbackError
from humpback_jax.parallel.processes import wait_for_all
from humpback_jax.rows import check_form, write_rows

Row = dict[str, Any]
Item = TypeVar("Item")


class Shards:
    """The finished part of one output file, in a folder beside it until all is done.

    A shard is a file of rows that appears complete or not at all. The folder belongs to one job,
    named by its fingerprint: shards of another job are deleted.
    """

    def __init__(self, out: Path, form: str | None, fingerprint: str) -> None:
        """Raises HumpbackError for an unknown form or a place that cannot be written."""
        self.out, self.form = out, check_form(out, form)
        self.folder = out.with_name(f".{out.name}.shards")
        description = self.folder / "job.json"
        try:
            if not description.exists() or _read(description) != fingerprint:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                write_json(description, fingerprint)
        except OSError as error:
            raise HumpbackError(f"{out} cannot be written ({error.strerror or error}).") from error
        self.done = self._found()

    def _found(self) -> set[int]:
        return {int(path.stem) for path in self.folder.glob("*.jsonl")}

    def part(self, total: int, size: int, takes: Callable[[int], bool]) -> tuple[int, int]:
        """(items of the shards of this process, those of finished ones) of `total` in all."""
        sizes = {n: min(size, total - n * size) for n in range(-(-total // size)) if takes(n)}
        return sum(sizes.values()), sum(sizes[number] for number in sizes.keys() & self.done)

    def missing(
        self, items: Iterable[Item], size: int, takes: Callable[[int], bool]
    ) -> Iterator[tuple[int, list[Item]]]:
        """(number, items) of the shards of this process that are not finished.

        Args:
          items: of all shards, read as shards are asked for. size: items of a shard.
          takes: says of a shard's number whether it is this process's.
        """
        for number, shard in _cut(items, size):
            if takes(number) and number not in self.done:
                yield number, shard

    def write(self, number: int, rows: Iterable[Row]) -> None:
        write_rows(self.folder / f"{number:06d}.jsonl", rows)
        self.done.add(number)

    def wait(self) -> None:
        """Returns once every process of the job has written its shards."""
        wait_for_all("all shards are written")
        self.done = self._found()

    def join(self, rows: Iterable[Row] | None = None) -> None:
        """Writes the output file, once for all processes, and deletes the shards.

        Args:
          rows: what to write in place of the shards' rows; read when all shards are there.
        """
        self.wait()
        if jax.process_index() == 0:
            write_rows(self.out, self.rows() if rows is None else rows, self.form)
            shutil.rmtree(self.folder, ignore_errors=True)
        wait_for_all("the output file is written")

    def rows(self) -> Iterator[Row]:
        """All rows written so far, in order."""
        for number in sorted(self.done):
            with open(self.folder / f"{number:06d}.jsonl", encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)


def _cut(items: Iterable[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """(number, items) of each shard, read as they are asked for."""
    rest = iter(items)
    for number in itertools.count():
        if not (shard := list(itertools.islice(rest, size))):
            return
        yield number, shard


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
