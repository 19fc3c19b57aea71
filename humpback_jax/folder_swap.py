"""Several files and folders that make one thing, replaced together: none is left half new.

They are written under `NEW`. Renaming that to `WHOLE` is the one moment from which the new thing
counts: a kill before it leaves the old one alone. Then each part moves to its place, the files
before the folders, and whoever reads asks `part` for it, which looks under `WHOLE` first: a kill in
between leaves the new thing, and the next replacement moves the rest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

NEW, WHOLE = ".new", ".whole"


@contextlib.contextmanager
def replaced_together(folder: Path) -> Iterator[Path]:
    """Hands out an empty folder; what is written there replaces its like in `folder` at the end.

    Until then the disk holds both. Where the body raises, `folder` keeps what it had. Parts that
    are not written stay: one that is has to say which others belong to it. Processes that write
    together enter this together.
    """
    import jax

    from humpback_jax.parallel.processes import wait_for_all

    first, new = jax.process_index() == 0, folder / NEW
    if first:
        _move(folder)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    wait_for_all(f"{new} is empty")
    try:
        yield new
    except BaseException:
        if first:
            shutil.rmtree(new, ignore_errors=True)  # makes room
        raise
    wait_for_all(f"{new} is written")
    if first:
        new.rename(folder / WHOLE)
        _move(folder)
    wait_for_all(f"{folder} is written")


def part(folder: Path, name: str) -> Path:
    """Where the part of that name is to be read."""
    moving = folder / WHOLE / name
    return moving if moving.exists() else folder / name


def _move(folder: Path) -> None:
    """Puts what is under `WHOLE` in its place."""
    whole = folder / WHOLE
    if not whole.exists():
        return
    for new in sorted(whole.iterdir(), key=lambda path: path.is_dir()):
        old = folder / new.name
        if new.is_dir() and old.exists():
            shutil.rmtree(old)
        os.replace(new, old)
    whole.rmdir()
