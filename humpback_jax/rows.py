"""Reading and writing row files: every common form of instruction data, detected row by row."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from humpback_jax.errors import HumpbackError
from humpback_jax.records import Example, Message, stable_id

Row = dict[str, Any]
FORMS = (
    "messages; instruction (+ input) + output or response; prompt + completion; "
    "conversations (from / value); inputs + targets; text"
)
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
}


@dataclasses.dataclass
class ReadReport:
    """What was found in a file.

    Attributes:
      forms: rows by detected form. bad: skipped rows by reason. renamed: duplicate ids given a
        suffix.
    """

    rows: int = 0
    forms: dict[str, int] = dataclasses.field(default_factory=dict)
    bad: dict[str, int] = dataclasses.field(default_factory=dict)
    renamed: int = 0


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A row to answer: its conversation so far, and the row itself, to which output is added."""

    id: str
    messages: list[dict[str, str]]
    row: Row


class _BadRow(Exception):
    """A row that cannot be used; the message says why, without the place."""


def read_examples(
    path: Path, source: str, skip_bad: bool = False
) -> tuple[list[Example], ReadReport]:
    """Reads training or evaluation rows from .jsonl, .json (a list), .parquet; also .gz and .zst.

    Args:
      source: given to every row; decides its tags.
      skip_bad: count unusable rows by reason instead of stopping at the first.

    Raises:
      HumpbackError: names file, row and field, and says what to do.
    """
    report = ReadReport()
    examples: list[Example] = []
    seen: collections.Counter[str] = collections.Counter()
    for place, row in _rows(path, report, skip_bad):
        try:
            form, messages, text = _parse(row)
        except _BadRow as error:
            _reject(path, place, str(error), report, skip_bad)
            continue
        report.forms[form] = report.forms.get(form, 0) + 1
        given = row.get("id")
        name = str(given) if isinstance(given, str | int) else stable_id(json.dumps(row))
        seen[name] += 1
        if seen[name] > 1:
            report.renamed += 1
            name = f"{name}#{seen[name]}"
        examples.append(Example(name, messages, source, text))
    report.rows = len(examples)
    if not examples:
        raise HumpbackError(f"{path}: no usable row. Accepted forms: {FORMS}. {_counts(report)}")
    return examples, report


def read_prompts(path: Path, skip_bad: bool = False) -> tuple[list[Prompt], ReadReport]:
    """Reads rows to be answered: `messages`, `prompt`, `instruction` (+ `input`), or `text`.

    Raises:
      HumpbackError: names file, row and field.
    """
    report = ReadReport()
    prompts = []
    seen: collections.Counter[str] = collections.Counter()
    for place, row in _rows(path, report, skip_bad):
        try:
            messages = _prompt_messages(row)
        except _BadRow as error:
            _reject(path, place, str(error), report, skip_bad)
            continue
        given = row.get("id")
        name = str(given) if isinstance(given, str | int) else stable_id(json.dumps(messages))
        seen[name] += 1
        if seen[name] > 1:
            name = f"{name}#{seen[name]}"
        prompts.append(Prompt(name, messages, row))
    report.rows = len(prompts)
    if not prompts:
        raise HumpbackError(f"{path}: no usable prompt. {_counts(report)}")
    return prompts, report


def single_prompt(text: str) -> Prompt:
    """One prompt given on the command line."""
    if not text.strip():
        raise HumpbackError("--prompt is empty.")
    return Prompt(stable_id(text), [{"role": "user", "content": text}], {"prompt": text})


def write_rows(path: Path, rows: Iterable[Row], form: str | None = None) -> None:
    """Writes .jsonl or .parquet (zstd), by `form` or else by the name; replaces atomically.

    Raises:
      HumpbackError: an unknown form, or a place that cannot be written.
    """
    form = form or path.suffix.lstrip(".")
    if form not in ("jsonl", "parquet"):
        raise HumpbackError(f"{path}: rows are written as .jsonl or .parquet, not {form!r}.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "jsonl":
            with open(temporary, "w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(list(rows)), temporary, compression="zstd")
        temporary.replace(path)
    except OSError as error:
        raise HumpbackError(f"{path} cannot be written ({error.strerror}).") from error


def open_text(path: Path) -> io.TextIOBase:
    """Opens a text file, decompressing .gz and .zst; UTF-8 is required."""
    if not path.exists():
        raise HumpbackError(f"{path}: the file does not exist.")
    if not path.is_file():
        raise HumpbackError(f"{path} is not a file.")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import zstandard

        stream = zstandard.ZstdDecompressor().stream_reader(open(path, "rb"))  # noqa: SIM115
        return io.TextIOWrapper(stream, encoding="utf-8")
    return open(path, encoding="utf-8")


def raw_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, parsed row) of a file; a malformed JSON line comes as a `json.JSONDecodeError`.

    Raises:
      HumpbackError: missing file, not UTF-8, an unreadable container, or an unknown suffix.
    """
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    try:
        if name.endswith(".jsonl"):
            yield from _json_lines(path)
        elif name.endswith(".json"):
            yield from _json_list(path)
        elif name.endswith(".parquet"):
            yield from _parquet(path)
        else:
            open_text(path).close()
            raise HumpbackError(
                f"{path}: unknown kind of file; use .jsonl, .json or .parquet (.gz, .zst)."
            )
    except UnicodeDecodeError as error:
        raise HumpbackError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Convert the file, for "
            "example with iconv."
        ) from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise HumpbackError(f"{path}: the compressed file is damaged ({error}).") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    yield f"line {number}", error


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    with open_text(path) as file:
        text = file.read()
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise HumpbackError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg})."
        ) from error
    if not isinstance(rows, list):
        raise HumpbackError(f"{path}: expected a JSON list of rows, found {type(rows).__name__}.")
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        raise HumpbackError(f"{path}: the file does not exist.")
    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except pa.ArrowException as error:
        raise HumpbackError(f"{path}: not a readable parquet file ({error}).") from error


def _rows(path: Path, report: ReadReport, skip_bad: bool) -> Iterator[tuple[str, Row]]:
    for place, row in raw_rows(path):
        if isinstance(row, json.JSONDecodeError):
            _reject(path, place, f"not valid JSON ({row.msg})", report, skip_bad)
        elif not isinstance(row, dict):
            _reject(
                path, place, f"expected an object, found {type(row).__name__}", report, skip_bad
            )
        else:
            yield place, {key: value for key, value in row.items() if value is not None}


def _reject(path: Path, place: str, reason: str, report: ReadReport, skip_bad: bool) -> None:
    if not skip_bad:
        raise HumpbackError(f"{path}, {place}: {reason}. Mend the row, or pass --skip-bad.")
    label = reason.split(" (")[0].split(":")[0]
    report.bad[label] = report.bad.get(label, 0) + 1


def _counts(report: ReadReport) -> str:
    return f"Skipped rows by reason: {report.bad}." if report.bad else "The file is empty."


def _parse(row: Row) -> tuple[str, tuple[Message, ...], str | None]:
    """(form, messages, plain text or None) of a row."""
    if "messages" in row:
        return "messages", _conversation(row, "messages", "role", "content"), None
    if "conversations" in row:
        return "conversations", _conversation(row, "conversations", "from", "value"), None
    for x, y in (
        ("instruction", "output"),
        ("instruction", "response"),
        ("prompt", "completion"),
        ("inputs", "targets"),
    ):
        if x in row and y in row:
            turns = [*_history(row), Message("user", _request(row, x))]
            turns.append(Message("assistant", _text(row, y)))
            return f"{x}+{y}", tuple(turns), None
    if "text" in row:
        return "text", (), _text(row, "text")
    raise _BadRow(f"unknown form with the fields {sorted(row)}; accepted: {FORMS}")


def _conversation(row: Row, field: str, role_key: str, text_key: str) -> tuple[Message, ...]:
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        raise _BadRow(f"field {field!r}: expected a list of turns")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or turn.get(role_key) not in _ROLES:
            raise _BadRow(
                f"field {field!r}: turn {number} needs {role_key!r} in {sorted(_ROLES)} and "
                f"{text_key!r}"
            )
        content = turn.get(text_key)
        if not isinstance(content, str):
            raise _BadRow(f"field {field!r}: turn {number} has no text in {text_key!r}")
        role = _ROLES[turn[role_key]]
        if role == "assistant" and not content.strip():
            raise _BadRow(f"field {field!r}: turn {number}, the response is empty")
        messages.append(Message(role, content))
    while messages and messages[-1].role != "assistant":
        messages.pop()  # a conversation that ends with a request has no answer to learn
    if not any(message.role == "assistant" for message in messages):
        raise _BadRow(f"field {field!r}: no assistant turn")
    return tuple(messages)


def _history(row: Row) -> list[Message]:
    """LLaMA-Factory's `history`: earlier [user, assistant] turns."""
    turns = []
    for pair in row.get("history") or []:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise _BadRow("field 'history': expected a list of [user, assistant] texts")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return turns


def _request(row: Row, field: str) -> str:
    text = _text(row, field)
    extra = row.get("input") if field == "instruction" else None
    if extra is not None and not isinstance(extra, str):
        raise _BadRow(f"field 'input': expected text, found {type(extra).__name__}")
    return f"{text}\n\n{extra}" if extra and extra.strip() else text


def _text(row: Row, field: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise _BadRow(f"field {field!r}: expected text, found {type(value).__name__}")
    if not value.strip():
        what = "response" if field in ("output", "response", "completion", "targets") else "text"
        raise _BadRow(f"field {field!r}: the {what} is empty")
    return value


def _prompt_messages(row: Row) -> list[dict[str, str]]:
    if "messages" in row:
        turns = row["messages"]
        valid = isinstance(turns, list) and turns
        if not valid or not all(
            isinstance(t, Mapping) and t.get("role") in _ROLES and isinstance(t.get("content"), str)
            for t in turns
        ):
            raise _BadRow("field 'messages': expected a list of {role, content}")
        messages = [{"role": _ROLES[t["role"]], "content": t["content"]} for t in turns]
        if messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] != "user":
            raise _BadRow("field 'messages': the last turn must be the user's")
        return messages
    for field in ("prompt", "instruction", "inputs", "text"):
        if field in row:
            return [{"role": "user", "content": _request(row, field)}]
    raise _BadRow(
        f"unknown form with the fields {sorted(row)}; accepted: messages, prompt, instruction "
        "(+ input), inputs, text"
    )
