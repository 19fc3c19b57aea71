"""Documents from files, folders, and the packaged default corpus."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from humpback_jax.errors import HumpbackError
from humpback_jax.records import stable_id
from humpback_jax.rows import open_text, raw_rows

PYDOC_TOPICS = "pydoc_topics"
_ROW_FILES = (".jsonl", ".json", ".parquet")
_TEXT_FILES = (".txt", ".md", ".rst")


@dataclasses.dataclass(frozen=True)
class Document:
    """A text with its id; `source` names the file or collection it stands in."""

    id: str
    text: str
    source: str


def read_documents(paths: Sequence[str]) -> Iterator[Document]:
    """Documents of each path, in order.

    A path is a row file with a `text` field (.jsonl, .json, .parquet, also .gz and .zst), a text
    file (.txt, .md, .rst: one document), a folder of such files (sorted, recursive), or
    `pydoc_topics`, the language reference that every Python ships.

    Raises:
      HumpbackError: missing or unreadable files, rows without text; names file and row.
    """
    for path in paths:
        if path == PYDOC_TOPICS:
            yield from _pydoc_topics()
            continue
        place = Path(path)
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
        if file.is_file() and _kind(file) in _ROW_FILES + _TEXT_FILES:
            yield file


def _kind(file: Path) -> str:
    return Path(file.name.removesuffix(".gz").removesuffix(".zst")).suffix


def _file(file: Path, root: Path) -> Iterator[Document]:
    name = str(file.relative_to(root))
    if _kind(file) in _TEXT_FILES:
        try:
            with open_text(file) as stream:
                text = stream.read()
        except UnicodeDecodeError as error:
            raise HumpbackError(
                f"{file}: not UTF-8 text ({error.reason} at byte {error.start}). Convert the file, "
                "for example with iconv."
            ) from error
        yield Document(name, text, name)
        return
    for place, row in raw_rows(file):
        if isinstance(row, json.JSONDecodeError):
            raise HumpbackError(f"{file}, {place}: not valid JSON ({row.msg}).")
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise HumpbackError(f"{file}, {place}: the field 'text' is missing or not text.")
        given = row.get("id")
        yield Document(str(given) if given is not None else stable_id(text), text, name)


def _pydoc_topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"pydoc/{name}", topics[name], PYDOC_TOPICS)
