"""Documents from files, folders, and the packaged default corpus."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from humpback_jax.errors import HumpbackError
from humpback_jax.records import stable_id
from humpback_jax.row_files import is_unicode, malformed, raw_rows, read_text
from humpback_jax.rows import unique_name
from humpback_jax.tfds_splits import is_split

PYDOC_TOPICS = "pydoc_topics"
_ROW_FILES = (".jsonl", ".json", ".parquet")
_TEXT_FILES = (".txt", ".md", ".rst")


@dataclasses.dataclass(frozen=True)
class Document:
    """A text with its id; `source` names the file or collection it stands in.

    Attributes:
      text: line ends are "\\n", whatever the file has, and there is no byte order mark; byte spans
        refer to this text.
    """

    id: str
    text: str
    source: str


def read_documents(paths: Sequence[str]) -> Iterator[Document]:
    """Documents of each path, in order; an id met before is given a number.

    A path is a row file with a `text` field (.jsonl, .json, .parquet, also .gz and .zst), a text
    file (.txt, .md, .rst: one document), a split of a TFDS data set (`tfds_splits`), a folder of
    such files (sorted, recursive), or `pydoc_topics`, the language reference that every Python
    ships.

    Raises:
      HumpbackError: missing or unreadable files, rows without text; names file and row.
    """
    seen: collections.Counter[str] = collections.Counter()
    for path in paths:
        for document in _path(path):
            name = unique_name(document.id, seen)
            yield document if name == document.id else dataclasses.replace(document, id=name)


def _path(path: str) -> Iterator[Document]:
    if path == PYDOC_TOPICS:
        yield from _pydoc_topics()
        return
    place = Path(path)
    if is_split(place):
        yield from _rows(place, str(place))
        return
    if not place.exists():
        raise HumpbackError(
            f"{path}: no such document file or folder (corpus.documents; {PYDOC_TOPICS!r} is "
            "the packaged corpus)."
        )
    files = sorted(_readable(place)) if place.is_dir() else [place]
    if not files:
        raise HumpbackError(f"{path}: the folder holds no {', '.join(_ROW_FILES + _TEXT_FILES)}.")
    for file in files:
        yield from _file(file, place if place.is_dir() else place.parent)


def _readable(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and file.is_file() and _kind(file) in _ROW_FILES + _TEXT_FILES:
            yield file


def _kind(file: Path) -> str:
    return Path(file.name.removesuffix(".gz").removesuffix(".zst")).suffix


def _file(file: Path, root: Path) -> Iterator[Document]:
    name, kind = str(file.relative_to(root)), _kind(file)
    if kind in _TEXT_FILES:
        yield Document(name, _plain_line_ends(read_text(file)), name)
        return
    if kind not in _ROW_FILES:
        raise HumpbackError(
            f"{file}: unknown kind of document file; use {', '.join(_ROW_FILES + _TEXT_FILES)} "
            "(.gz, .zst)."
        )
    yield from _rows(file, name)


def _rows(file: Path, name: str) -> Iterator[Document]:
    for place, row in raw_rows(file):
        if isinstance(row, ValueError):
            raise HumpbackError(f"{file}, {place}: {malformed(row)}.")
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise HumpbackError(f"{file}, {place}: the field 'text' is missing or not text.")
        given = row.get("id")
        if not is_unicode(f"{text}{given}"):
            raise HumpbackError(f"{file}, {place}: the text holds half of a surrogate pair.")
        identity = stable_id(text) if given is None else str(given)
        yield Document(identity, _plain_line_ends(text), name)


def _plain_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _pydoc_topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"pydoc/{name}", topics[name], PYDOC_TOPICS)
