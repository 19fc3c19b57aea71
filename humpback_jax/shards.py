"""Output of a long job: shards written one by one, kept over a restart, joined at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from humpback_jax.artifacts import write_json
from humpback_jax.errors import HumpbackError
from humpback_jax.lock import sole_user
from humpback_jax.parallel.processes import first_alone, wait_for_all
from humpback_jax.rows import check_form, write_rows

Row = dict[str, Any]
Item = TypeVar("Item")
SHARD_ROWS = 256  # of the output


@contextlib.contextmanager
def open_shards(
    out: Path, form: str | None, identity: str, total: int, takes: Callable[[int], bool]
) -> Iterator[Shards]:
    """The shards of one job, whose output no other job writes meanwhile.

    Args:
      identity: names what the rows depend on. Shards of another job are deleted.
      total: rows of the whole output.
      takes: says of a shard's number whether it is this process's.

    Raises:
      HumpbackError: an unknown form, a place that cannot be written, another job at work on the
        same output, or processes of this job that read different things.
    """
    form = check_form(out, form)
    folder = out.with_name(f".{out.name}.shards")
    description = [identity, total, SHARD_ROWS]
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            if jax.process_index() == 0:
                _make(folder, out)
                stack.enter_context(sole_user(folder))
                _claim(folder, description)
            elif _read(folder / "job.json") != description:
                raise HumpbackError(
                    f"{out}: process {jax.process_index()} has other rows, another model or other "
                    "settings than process 0. Every host must read the same files."
                )

        first_alone("the output", enter)
        yield Shards(out, form, folder, total, SHARD_ROWS, takes)


def _make(folder: Path, out: Path) -> None:
    if out.is_dir():
        raise HumpbackError(f"{out} is a folder; --out names a file.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HumpbackError(f"{out} cannot be written ({error.strerror or error}).") from error


def _claim(folder: Path, description: list[Any]) -> None:
    """Deletes what is not of the job so described."""
    if _read(folder / "job.json") != description:
        for file in folder.glob("*.json*"):
            file.unlink()
        write_json(folder / "job.json", description)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows that can be read more than once."""

    read: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.read()


class Shards:
    """The finished part of one output file, in a folder beside it until all is done.

    A shard is a file of rows that appears complete or not at all. See `open_shards`.
    """

    def __init__(
        self,
        out: Path,
        form: str,
        folder: Path,
        total: int,
        size: int,
        takes: Callable[[int], bool],
    ) -> None:
        self.out, self.form, self.folder = out, form, folder
        self._sizes = [min(size, total - start) for start in range(0, total, size)]
        self._size, self._takes = size, takes
        self.done = self._found()

    def _found(self) -> set[int]:
        return {int(path.stem) for path in self.folder.glob("*.jsonl")}

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.jsonl"

    def part(self) -> tuple[int, int]:
        """(rows of the shards of this process, those of finished ones)."""
        sizes = {n: size for n, size in enumerate(self._sizes) if self._takes(n)}
        return sum(sizes.values()), sum(sizes[number] for number in sizes.keys() & self.done)

    def missing(self, items: Iterable[Item]) -> Iterator[tuple[int, list[Item]]]:
        """(number, items) of the shards of this process that are not finished.

        Args:
          items: one for each row of the output, read as shards are asked for.
        """
        for number, shard in _cut(items, self._size):
            if self._takes(number) and number not in self.done:
                yield number, shard

    def write(self, number: int, rows: Iterable[Row]) -> None:
        write_rows(self._path(number), rows)
        self.done.add(number)

    def wait(self) -> None:
        """Returns once every process of the job has written its shards."""
        wait_for_all("all shards are written")
        self.done = self._found()

    def join(self, rows: Callable[[], Iterator[Row]] | None = None) -> None:
        """Writes the output file, once for all processes, and deletes the shards.

        Args:
          rows: what to write in place of the shards' rows; called when all shards are there.

        Raises:
          HumpbackError: a shard is lost or incomplete, or the file cannot be written. What is
            complete stays.
        """
        self.wait()
        if jax.process_index() == 0:
            self._check()
            write_rows(self.out, _Rows(rows or self.rows), self.form)
            shutil.rmtree(self.folder, ignore_errors=True)
        wait_for_all("the output file is written")

    def _check(self) -> None:
        bad = [n for n, size in enumerate(self._sizes) if self._count(n) != size]
        for number in bad:
            self._path(number).unlink(missing_ok=True)
        if bad:
            raise HumpbackError(
                f"{self.out}: {len(bad)} of {len(self._sizes)} shards are lost or incomplete in "
                f"{self.folder}. Run the same command again: it computes these alone."
            )

    def _count(self, number: int) -> int:
        if number not in self.done:
            return -1
        with open(self._path(number), "rb") as file:
            return sum(1 for _ in file)

    def rows(self) -> Iterator[Row]:
        """All rows written so far, in order."""
        for number in sorted(self.done):
            with open(self._path(number), encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)


def _cut(items: Iterable[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """(number, items) of each shard, read as they are asked for."""
    rest = iter(items)
    for number in itertools.count():
        if not (shard := list(itertools.islice(rest, size))):
            return
        yield number, shard
