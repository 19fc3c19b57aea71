"""Documents from files, folders, and the packaged default corpus."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from humpback_jax.errors import HumpbackError
from humpback_jax.records import stable_id
from humpback_jax.row_files import is_unicode, malformed, raw_rows, read_text
from humpback_jax.rows import unique_name
from humpback_jax.tfds_splits import is_split

PYDOC_TOPICS = "pydoc_topics"
_ROW_FILES = (".jsonl", ".json", ".parquet")
_TEXT_FILES = (".txt", ".md", ".markdown", ".rst")
_KNOWN = f"{', '.join(_ROW_FILES + _TEXT_FILES)} (.gz, .zst)"


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


@dataclasses.dataclass
class DocumentReport:
    """What was left out of a corpus.

    Attributes:
      skip_bad: whether a bad document is counted and left out, or stops the reading.
      rejected: bad documents by reason. passed_over: files of folders by suffix, "" of none.
    """

    skip_bad: bool = False
    rejected: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    passed_over: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def reject(self, reason: str, message: str) -> None:
        """Counts a bad document under `reason`.

        Raises:
          HumpbackError: bad documents shall stop the reading.
        """
        if not self.skip_bad:
            raise HumpbackError(
                f"{message}. Fix the document, or leave such out by --config.corpus.skip_bad=true."
            )
        self.rejected[reason] += 1

    def passed_over_line(self) -> str:
        """The files of folders that hold no documents, as a sentence; "" where there are none."""
        if not self.passed_over:
            return ""
        listed = (f"{n} {suffix or 'without one'}" for suffix, n in self.passed_over.most_common(8))
        return (
            f"{self.passed_over.total()} files are not read, for their suffixes: "
            f"{', '.join(listed)}; read are {_KNOWN}"
        )


def read_documents(
    paths: Sequence[str], report: DocumentReport | None = None
) -> Iterator[Document]:
    """Documents of each path, in order; an id met before is given a number.

    A path is a row file with a `text` field (.jsonl, .json, .parquet, also .gz and .zst), a text
    file (.txt, .md, .markdown, .rst: one document), a split of a TFDS data set (`tfds_splits`), a
    folder of such files (sorted, recursive), or `pydoc_topics`, the language reference that every
    Python ships.

    Args:
      report: filled in as documents are read.

    Raises:
      HumpbackError: missing or unreadable files, rows without text; names file and row.
    """
    report = report or DocumentReport()
    seen: collections.Counter[str] = collections.Counter()
    for path in paths:
        for document in _path(path, report):
            name = unique_name(document.id, seen)
            yield document if name == document.id else dataclasses.replace(document, id=name)


def _path(path: str, report: DocumentReport) -> Iterator[Document]:
    if path == PYDOC_TOPICS:
        yield from _pydoc_topics()
        return
    place = Path(path)
    if is_split(place):
        yield from _documents(raw_rows(place), place, str(place), report)
        return
    if not place.exists():
        raise HumpbackError(
            f"{path}: no such document file or folder (corpus.documents; {PYDOC_TOPICS!r} is "
            "the packaged corpus)."
        )
    for file in _files_of(place, report) if place.is_dir() else [place]:
        yield from _file(file, place if place.is_dir() else place.parent, report)


def _files_of(folder: Path, report: DocumentReport) -> list[Path]:
    """The folder's files of known kinds, sorted; those that hide are not even passed over."""
    files = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or not file.is_file():
            continue
        if _kind(file) in _ROW_FILES + _TEXT_FILES:
            files.append(file)
        else:
            report.passed_over[_kind(file)] += 1
    if not files:
        line = report.passed_over_line()
        raise HumpbackError(f"{folder}: the folder holds no {_KNOWN}. {line and f'{line}.'}")
    return files


def _kind(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix


def _file(file: Path, root: Path, report: DocumentReport) -> Iterator[Document]:
    name, kind = str(file.relative_to(root)), _kind(file)
    if kind in _ROW_FILES:
        yield from _documents(_rows(file, report), file, name, report)
    elif kind in _TEXT_FILES:
        try:
            text = read_text(file)
        except HumpbackError as error:
            _unreadable(error, report)
        else:
            yield Document(name, _plain(text), name)
    else:
        raise HumpbackError(f"{file}: unknown kind of document file; use {_KNOWN}.")


def _rows(file: Path, report: DocumentReport) -> Iterator[tuple[str, Any]]:
    """The rows of a file up to where it is damaged."""
    try:
        yield from raw_rows(file)
    except HumpbackError as error:
        _unreadable(error, report)


def _unreadable(error: HumpbackError, report: DocumentReport) -> None:
    report.reject("unreadable file", str(error).rstrip("."))


def _documents(
    rows: Iterator[tuple[str, Any]], file: Path, name: str, report: DocumentReport
) -> Iterator[Document]:
    for place, row in rows:
        if fault := _fault(row):
            report.reject(fault.partition(":")[0], f"{file}, {place}: {fault}")
        else:
            text, given = row["text"], row.get("id")
            identity = stable_id(text) if given is None else str(given)
            yield Document(identity, _plain(text), name)


def _fault(row: Any) -> str:
    """Why a row is no document: what is counted, and behind a colon the rest; "" of a good one."""
    if isinstance(row, ValueError):
        return malformed(row)
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = "missing" if text is None else type(text).__name__
        return f"text missing or not text: the field 'text' is {found}"
    if not is_unicode(f"{text}{row.get('id')}"):
        return "contains an unpaired surrogate: one of \\ud800 to \\udfff, which is no character"
    return ""


def _plain(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _pydoc_topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"pydoc/{name}", topics[name], PYDOC_TOPICS)
