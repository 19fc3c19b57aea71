"""Files of rows, and text files, as they lie on the disk: what a row means is said in `rows`."""

from __future__ import annotations

import base64
import contextlib
import datetime
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from humpback_jax.errors import HumpbackError
from humpback_jax.tfds_splits import is_split, split_rows

_BOM = b"\xef\xbb\xbf"


def open_bytes(path: Path) -> BinaryIO:
    """Opens a file for reading, decompressing .gz and .zst.

    Raises:
      HumpbackError: there is no such file, or it cannot be opened.
    """
    if not path.exists():
        raise HumpbackError(f"{path}: the file does not exist.")
    if not path.is_file():
        raise HumpbackError(f"{path} is not a file.")
    with readable(path):
        if path.suffix.lower() == ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        if path.suffix.lower() == ".zst":
            import pyarrow as pa

            # Unlike zstandard's own reader, Arrow's reports a truncated file.
            return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
        return open(path, "rb")


def read_text(path: Path) -> str:
    """A whole text file, without the byte order mark.

    Raises:
      HumpbackError: missing, damaged or not UTF-8.
    """
    with readable(path), open_bytes(path) as file:
        return file.read().removeprefix(_BOM).decode()


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns whatever goes wrong while reading a file into a message that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise HumpbackError(f"{path}: {malformed(error)}.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise HumpbackError(f"{path}: the compressed file is damaged ({error}).") from error
    except OSError as error:
        raise HumpbackError(f"{path} cannot be read ({error.strerror or error}).") from error


def raw_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, parsed row) of .jsonl, .json (a list), .parquet, also .gz and .zst, or of a split of
    a TFDS data set; a row that cannot be parsed comes as its `ValueError`.

    Raises:
      HumpbackError: missing file, an unreadable container, or an unknown suffix.
    """
    if is_split(path):
        yield from split_rows(path)
        return
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    with readable(path):
        if name.endswith(".jsonl"):
            yield from _json_lines(path)
        elif name.endswith(".json"):
            yield from _json_list(path)
        elif name.endswith(".parquet"):
            yield from _parquet(path)
        else:
            open_bytes(path).close()
            raise HumpbackError(
                f"{path}: unknown kind of file; use .jsonl, .json or .parquet (.gz, .zst), or the "
                "folder of a prepared TFDS data set."
            )


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line.decode())
                except ValueError as error:
                    yield f"line {number}", error
                except RecursionError:
                    yield f"line {number}", ValueError("nested too deeply")


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise HumpbackError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}). A file with one row a "
            "line is named .jsonl."
        ) from error
    except RecursionError as error:
        raise HumpbackError(f"{path}: not a list of rows; it is nested too deeply.") from error
    if not isinstance(rows, list):
        raise HumpbackError(f"{path}: expected a JSON list of rows, found {type(rows).__name__}.")
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    open_bytes(path).close()
    try:
        packed = path.suffix.lower() != ".parquet"
        # It is read from its end: what is compressed has to be unpacked as a whole.
        file = pq.ParquetFile(pa.py_buffer(open_bytes(path).read()) if packed else path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pa.ArrowException, ValueError, OverflowError) as error:  # the last two: of dates
        raise HumpbackError(f"{path}: not a readable parquet file ({error}).") from error


def plain(value: Any) -> Any:
    """A value of a row as JSON has it: times in ISO 8601, bytes as UTF-8 text or else base64.

    What is no number is null: JSON has no NaN and no infinity, and readers other than Python's
    refuse a file with one.
    """
    match value:
        case None | str() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: plain(item) for name, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return base64.b64encode(value).decode()
        case datetime.date() | datetime.time():
            return value.isoformat()
        case _:
            return str(value)


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON can spell half of a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def malformed(error: ValueError) -> str:
    """What is wrong with a text or line that cannot be decoded or parsed."""
    if isinstance(error, UnicodeDecodeError):
        return (
            f"not UTF-8 text: {error.reason} at byte {error.start}; convert the file, for example "
            "with iconv"
        )
    return f"not valid JSON: {getattr(error, 'msg', error)}"
