"""Files of rows to a store of tokens: read as a stream, tokenised once, kept over a restart."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from humpback_jax.artifacts import write_json
from humpback_jax.errors import HumpbackError
from humpback_jax.models import LanguageModel
from humpback_jax.parallel.processes import all_or_none, first_alone
from humpback_jax.progress import Say
from humpback_jax.records import Example, stable_id
from humpback_jax.rows import ReadReport, stream_examples
from humpback_jax.stages.texts import Direction, none_left, render_usable, token_limit
from humpback_jax.text.template import Rendered
from humpback_jax.text.tokenize import TokenizedBatch, tokenize_batch
from humpback_jax.tfds_splits import info_file, is_split
from humpback_jax.token_store import TokenStore, write_shard

VERSION = 3
CHUNK = 512  # rows tokenised at one time
SHARD_CHUNKS = 64


@dataclasses.dataclass(frozen=True)
class RowFile:
    """A file of rows, and the source that they come from."""

    source: str
    path: Path


def parse_files(texts: Sequence[str], source: str) -> list[RowFile]:
    """`web=rows.jsonl` -> RowFile("web", rows.jsonl); a mere path has the given source."""
    files = []
    for text in texts:
        name, equals, path = text.partition("=")
        named = bool(equals) and name.replace("-", "_").isidentifier() and not Path(text).exists()
        files.append(RowFile(name, Path(path)) if named else RowFile(source, Path(text)))
    return files


@dataclasses.dataclass(frozen=True)
class Tokenization:
    """What determines the tokens of a row; `limit`: of rows, from each file; 0: all."""

    base: LanguageModel
    section: Any
    direction: Direction
    skip_bad: bool = False
    limit: int = 0

    def batch(self, examples: Sequence[Example]) -> TokenizedBatch:
        rows, refused = render_usable(self.base.template, examples, self.direction, self.skip_bad)
        longest = token_limit(self.base, self.section)
        batch = tokenize_batch(self.base.tokenizer, rows, longest, self.section.on_long)
        return dataclasses.replace(batch, dropped=(*refused, *batch.dropped))

    def first_rows(self, file: RowFile, count: int) -> list[tuple[str, Rendered]]:
        """(id, text with its supervised spans) of the first rows of a file, for people."""
        rows = stream_examples(file.path, file.source, ReadReport(), self.skip_bad)
        few = itertools.islice(rows, count)
        return render_usable(self.base.template, few, self.direction, self.skip_bad)[0]

    def key(self, file: RowFile) -> str:
        """Another one where the file or anything else changed that tokens depend on."""
        path = info_file(file.path) if is_split(file.path) else file.path
        try:
            found = path.stat()
        except OSError as error:
            raise HumpbackError(f"{file.path}: the file does not exist.") from error
        # Of the same name, size and time there may be several, e.g. out of an archive.
        parts = [VERSION, CHUNK * SHARD_CHUNKS, file.source, file.path.name, str(path.resolve())]
        parts += [found.st_size, found.st_mtime_ns]
        parts += [self.base.tokenizer.content_hash(), self.base.template.content_hash()]
        parts += [self.direction, token_limit(self.base, self.section), self.section.on_long]
        return stable_id(json.dumps([*parts, self.skip_bad, self.limit]))


def token_store(
    files: Sequence[RowFile], tokenization: Tokenization, folder: Path, say: Say
) -> tuple[TokenStore, dict[str, int]]:
    """(the store of all files' examples, unusable rows by reason).

    What a former start has finished under `folder` is not done again. Several processes share the
    work; where they do not share the folder, each makes all of it.

    Raises:
      HumpbackError: an unusable row, or one that `on_long="error"` refuses; a file of which nothing
        is left. Names file and row.
    """
    shards: list[Path] = []
    bad: dict[str, int] = {}
    for file in files:
        own = folder / f"{file.source}-{tokenization.key(file)}"
        report = _make(own, file, tokenization, say)
        parts = [own / _name(number) for number in range(report["shards"])]
        store = TokenStore(parts)
        tokens = int(store.columns.lengths.sum())
        dropped = dict(store.dropped)
        if not len(store):
            raise HumpbackError(f"{file.path}: {none_left(report['rows'], dropped)}")
        say(f"{file.path}: {len(store):,} examples, {tokens:,} tokens, dropped {dropped or 'none'}")
        shards += parts
        for reason, count in report["bad"].items():
            bad[reason] = bad.get(reason, 0) + count
    return TokenStore(shards), bad


def _make(folder: Path, file: RowFile, tokenization: Tokenization, say: Say) -> dict[str, Any]:
    """Makes a file's shards, each process its part; returns the manifest, which is written last."""
    processes, own = jax.process_count(), jax.process_index()
    manifest = folder / "store.json"

    def our_part() -> dict[str, Any]:
        found = json.loads(manifest.read_text("utf-8")) if manifest.exists() else None
        if found is not None and not _missing(folder, found):
            return dict(found)
        return _pass(folder, file, tokenization, say, lambda number: number % processes == own)

    found = all_or_none(f"tokenising {file.path}", our_part)
    if _missing(folder, found):  # the others do not write here
        _pass(folder, file, tokenization, say, lambda number: True)
    first_alone(f"noting {file.path} as tokenised", lambda: _note(manifest, found))
    return found


def _note(manifest: Path, found: dict[str, Any]) -> None:
    """Writes the manifest unless it is there, for instance because processes share the folder."""
    if not manifest.exists() or json.loads(manifest.read_text("utf-8")) != found:
        write_json(manifest, found)


def _missing(folder: Path, manifest: dict[str, Any]) -> bool:
    return not all((folder / _name(number)).exists() for number in range(manifest["shards"]))


def _pass(
    folder: Path,
    file: RowFile,
    tokenization: Tokenization,
    say: Say,
    ours: Callable[[int], bool],
) -> dict[str, Any]:
    """Reads the whole file, and writes those of our shards that are missing."""
    report, shards = ReadReport(), 0
    rows = stream_examples(
        file.path, file.source, report, tokenization.skip_bad, distinct_ids=False
    )
    rows = itertools.islice(rows, tokenization.limit or None)
    chunks = enumerate(iter(lambda: list(itertools.islice(rows, CHUNK)), []))
    for number, group in itertools.groupby(chunks, lambda chunk: chunk[0] // SHARD_CHUNKS):
        shards += 1
        shard = folder / _name(number)
        if ours(number) and not shard.exists():
            if number:
                say(f"{file.path}: tokenised {number * SHARD_CHUNKS * CHUNK:,} rows")
            write_shard(shard, file.source, (tokenization.batch(chunk) for _, chunk in group))
    return {"shards": shards, "rows": report.rows, "bad": report.bad}


def _name(number: int) -> str:
    return f"{number:05d}"
