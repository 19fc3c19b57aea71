"""Output of a long job: shards written one by one, kept over a restart, joined at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

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


class Collector(Generic[Item]):
    """Rows, in any form and order, handed on shard by shard as soon as one is complete."""

    def __init__(self, size: int, wants: Callable[[int], bool] = lambda shard: True) -> None:
        """`size`: rows of a shard. `wants`: says of a shard's number whether its rows will come."""
        self._size, self._wants = size, wants
        self._missing: dict[int, int] = {}
        self._rows: dict[int, dict[tuple[int, ...], Item]] = {}
        self._ended = False

    def wants(self, place: int) -> bool:
        """Whether the row at this place of the input is to be computed."""
        return self._wants(place // self._size)

    def expect(self, place: int, count: int = 1) -> None:
        """Rows for this place of the input will come; places are announced in order."""
        shard = place // self._size
        self._missing[shard] = self._missing.get(shard, 0) + count

    def end(self) -> None:
        """Nothing more is announced: the last shard may be a short one."""
        self._ended = True

    def add(self, place: int, rank: Sequence[int], row: Item) -> None:
        """`rank`: the order among the rows of this place."""
        shard = place // self._size
        self._rows.setdefault(shard, {})[place, *rank] = row
        self._missing[shard] -= 1

    def complete(self) -> Iterator[tuple[int, list[Item]]]:
        """(number, rows in order) of shards of which no row is missing, each given once."""
        last = max(self._missing, default=-1)
        for shard in sorted(self._missing):
            if self._missing[shard] == 0 and (shard < last or self._ended):
                found = self._rows.pop(shard, {})
                del self._missing[shard]
                yield shard, [found[key] for key in sorted(found)]


def shard_sizes(total: int, size: int) -> list[int]:
    """Rows of each shard of `total` rows."""
    return [min(size, total - start) for start in range(0, total, size)]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
