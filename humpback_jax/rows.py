"""Rows of instruction data in every common form, detected row by row; and writing rows."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from humpback_jax.errors import HumpbackError
from humpback_jax.records import Example, Message, stable_id
from humpback_jax.row_files import is_unicode, malformed, plain, raw_rows

Row = dict[str, Any]
FORMS = (
    "messages or conversations (role / content, from / value); instruction (+ input) + output or "
    "response; prompt + completion (texts, or turns); inputs + targets; text"
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
_CONVERSATIONS = ("messages", "conversations")
_PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("inputs", "targets"),
)
BATCH_ROWS = 4096  # of a parquet file, made at one time
_RESPONSES = tuple(response for _, response in _PAIRS)
_OF_PAIRS = tuple(dict.fromkeys(name for pair in _PAIRS for name in pair))
_FIELDS = {"text", *_CONVERSATIONS, *_OF_PAIRS}
# Beside `text` these say that it is a part of a dialogue: plain text has an origin, never a reply.
_OF_DIALOGUES = ("role", "parent_id", "question", "answer", *_OF_PAIRS)


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

    def skip(self, reason: str) -> None:
        """Counts a row that is left out."""
        self.bad[reason] = self.bad.get(reason, 0) + 1


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A row to answer: its conversation so far, and the row as JSON has it, to be written again."""

    id: str
    messages: list[dict[str, str]]
    row: Row


class _BadRow(Exception):
    """A row that cannot be used: "what is counted: which field, and what is wrong with it"."""


def read_examples(
    path: Path, source: str, skip_bad: bool = False
) -> tuple[list[Example], ReadReport]:
    """All of `stream_examples`, and what was found."""
    report = ReadReport()
    return list(stream_examples(path, source, report, skip_bad)), report


def stream_examples(
    path: Path,
    source: str,
    report: ReadReport,
    skip_bad: bool = False,
    distinct_ids: bool = True,
    pairs: bool = False,
) -> Iterator[Example]:
    """Training or evaluation rows from a file of any kind that `raw_rows` reads.

    Texts lose the white space at their ends: an answer that began with some could have its first
    token merged with the newline before it, which belongs to the prompt.

    Args:
      source: given to every row; decides its tags.
      report: filled in as rows are read.
      skip_bad: count unusable rows by reason instead of stopping at the first.
      distinct_ids: number equal ids, for which all ids are kept in memory.
      pairs: a row is unusable unless it is one request and its response, without anything before.

    Raises:
      HumpbackError: names file, row and field, and says what to do.
    """
    seen: collections.Counter[str] = collections.Counter()
    for place, row in _rows(path, report, skip_bad):
        try:
            form, messages, text = _parse(_without_empty(row))
            if pairs:
                _require_pair(messages)
        except _BadRow as error:
            _reject(path, place, str(error), report, skip_bad)
            continue
        report.forms[form] = report.forms.get(form, 0) + 1
        content = [[m.role, m.content] for m in messages]
        given = _given_id(row) or stable_id(json.dumps([content, text]))
        name = unique_name(given, seen) if distinct_ids else given
        report.renamed += name != given
        report.rows += 1
        yield Example(name, messages, source, text)
    if not report.rows:
        raise HumpbackError(f"{path}: no usable row. Accepted forms: {FORMS}. {_counts(report)}")


def stream_prompts(
    path: Path, report: ReadReport, skip_bad: bool = False, reverse: bool = False
) -> Iterator[Prompt]:
    """Rows to be answered: a conversation, `prompt`, `instruction` (+ `input`), or `text`.

    Args:
      report: filled in as rows are read.
      reverse: the row's response, where it has one, is what M_yx is asked about.

    Raises:
      HumpbackError: names file, row and field.
    """
    seen: collections.Counter[str] = collections.Counter()
    for place, row in _rows(path, report, skip_bad):
        try:
            told = _without_empty(row)
            turns = _response_turns(told) if reverse else _prompt_turns(told)
        except _BadRow as error:
            _reject(path, place, str(error), report, skip_bad)
            continue
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        given = _given_id(row) or stable_id(json.dumps(messages))
        name = unique_name(given, seen)
        report.renamed += name != given
        report.rows += 1
        yield Prompt(name, messages, plain(row))
    if not report.rows:
        raise HumpbackError(f"{path}: no usable prompt. {_counts(report)}")


def single_prompt(text: str) -> Prompt:
    """One prompt given on the command line."""
    if not text.strip():
        raise HumpbackError("--prompt is empty.")
    if not is_unicode(text):
        raise HumpbackError("--prompt is not UTF-8 text; convert it, for example with iconv.")
    return Prompt(stable_id(text), [{"role": "user", "content": text}], {"prompt": text})


def unique_name(name: str, seen: collections.Counter[str]) -> str:
    """`name`, or with a number after it where it is in `seen`, to which the result is added."""
    seen[name] += 1
    number = seen[name]
    if number == 1:
        return name
    while (numbered := f"{name}#{number}") in seen:
        number += 1
    seen[numbered] += 1
    return numbered


def check_form(path: Path, form: str | None) -> str:
    """`form`, or else the one that the name says; raises HumpbackError where rows have no such."""
    form = form or path.suffix.lstrip(".")
    if form not in ("jsonl", "parquet"):
        raise HumpbackError(f"{path}: rows are written as .jsonl or .parquet, not {form!r}.")
    return form


def write_rows(path: Path, rows: Iterable[Row], form: str | None = None) -> None:
    """Writes .jsonl or .parquet (zstd), by `form` or else by the name; replaces atomically.

    Args:
      rows: read twice for .parquet, which says of what types its columns are before the first row.

    Raises:
      HumpbackError: an unknown form, or a place that cannot be written.
    """
    form = check_form(path, form)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "jsonl":
            with open(temporary, "w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        else:
            _write_parquet(path, temporary, rows)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # a machine that dies must not leave an empty file of this name
        temporary.replace(path)
    except OSError as error:
        raise HumpbackError(f"{path} cannot be written ({error.strerror or error}).") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_parquet(path: Path, temporary: Path, rows: Iterable[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([])
    try:
        for batch in _batches(rows):
            names = dict.fromkeys(name for row in batch for name in row)
            columns = {name: pa.array([row.get(name) for row in batch]).type for name in names}
            found = pa.schema(list(columns.items()))
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for batch in _batches(rows):
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    except (pa.ArrowException, OverflowError) as error:
        raise HumpbackError(
            f"{path}: a field's values are of different types, which parquet cannot hold "
            f"({error}). Add --format=jsonl and keep --out: rows that are finished are then kept."
        ) from error


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rest = iter(rows)
    while batch := list(itertools.islice(rest, BATCH_ROWS)):
        yield batch


def _rows(path: Path, report: ReadReport, skip_bad: bool) -> Iterator[tuple[str, Row]]:
    for place, row in raw_rows(path):
        if isinstance(row, ValueError):
            reason = malformed(row)
        elif not isinstance(row, dict):
            reason = f"not an object: found {type(row).__name__}"
        elif not is_unicode(json.dumps(row, ensure_ascii=False, default=str)):
            reason = (
                "not valid Unicode: the row holds half of a surrogate pair (\\ud800 to \\udfff)"
            )
        else:
            yield place, {key: value for key, value in row.items() if value is not None}
            continue
        _reject(path, place, reason, report, skip_bad)


def _reject(path: Path, place: str, reason: str, report: ReadReport, skip_bad: bool) -> None:
    if not skip_bad:
        raise HumpbackError(f"{path}, {place}: {reason}. Fix the row, or pass --skip-bad.")
    report.skip(reason.partition(":")[0])


def _counts(report: ReadReport) -> str:
    return f"Skipped rows by reason: {report.bad}." if report.bad else "The file is empty."


def _given_id(row: Row) -> str:
    given = plain(row.get("id"))
    return str(given) if isinstance(given, str | int) and not isinstance(given, bool) else ""


def _without_empty(row: Row) -> Row:
    """The row without empty conversations, where it has another form beside them."""
    rest = {name: x for name, x in row.items() if not (name in _CONVERSATIONS and x == [])}
    return rest if rest.keys() & _FIELDS else row


def _parse(row: Row) -> tuple[str, tuple[Message, ...], str | None]:
    """(form, messages, plain text or None) of a row."""
    for field in _CONVERSATIONS:
        if field in row:
            return field, _training_turns(_turns(row, field), field), None
    if isinstance(row.get("prompt"), list) and "completion" in row:
        return "prompt+completion", _completed_turns(row), None
    for x, y in _PAIRS:
        if x in row and y in row:
            turns = [*_system(row), *_history(row), Message("user", _request(row, x))]
            turns.append(Message("assistant", _text(row, y, "response").strip()))
            return f"{x}+{y}", tuple(turns), None
    if "text" in row:
        _require_plain(row)
        return "text", (), _text(row, "text")
    raise _BadRow(f"unknown form: the fields are {sorted(row)}; accepted: {FORMS}")


def _require_plain(row: Row) -> None:
    found = [name for name in _OF_DIALOGUES if name in row]
    if found:
        raise _BadRow(
            f"text of a dialogue: beside 'text' the row has {', '.join(map(repr, found))}, and "
            "would be learnt whole, as a document. Rename the fields of a pair to instruction and "
            "output, gather single turns in 'messages' (role, content), or, where the texts are "
            "documents, remove the other fields"
        )


def _training_turns(turns: list[Message], field: str) -> tuple[Message, ...]:
    while turns and not (turns[-1].role == "assistant" and turns[-1].supervised):
        turns.pop()  # nothing is learnt from what follows the last answer
    roles = [turn.role for turn in turns if turn.role != "system"]
    if not roles:
        raise _BadRow(f"no answer: field {field!r} has no assistant turn to learn")
    if roles[0] != "user":
        raise _BadRow(f"no request: field {field!r} has no user turn before the first answer")
    return tuple(turns)


def _completed_turns(row: Row) -> tuple[Message, ...]:
    """TRL's conversational prompt and completion: of these, the completion alone is learnt."""
    prompt = [dataclasses.replace(turn, supervised=False) for turn in _turns(row, "prompt")]
    return _training_turns([*prompt, *_plain_turns(row, "completion")], "completion")


def _require_pair(messages: tuple[Message, ...]) -> None:
    roles = [message.role for message in messages]
    if roles != ["user", "assistant"]:
        raise _BadRow(
            "not a pair: it takes one request and its response, with no system text and no earlier "
            f"turns; found {', '.join(roles) or 'plain text'}"
        )


def _prompt_turns(row: Row) -> list[Message]:
    for field in _CONVERSATIONS:
        if field in row:
            turns = _turns(row, field)
            if turns[-1].role == "assistant":
                turns.pop()  # the row's own answer
            return _asking(turns, field)
    if isinstance(row.get("prompt"), list):
        return _asking(_turns(row, "prompt"), "prompt")
    for field in ("prompt", "instruction", "inputs", "text"):
        if field in row:
            return [*_system(row), *_history(row), Message("user", _request(row, field))]
    raise _BadRow(
        f"unknown form: the fields are {sorted(row)}; accepted: messages, conversations, prompt, "
        "instruction (+ input), inputs, text"
    )


def _response_turns(row: Row) -> list[Message]:
    """A row's response, or the text that stands alone in it, as a request of its own."""
    for field in (name for name in (*_CONVERSATIONS, *_RESPONSES) if name in row):
        if field in _RESPONSES and not isinstance(row[field], list):
            return [Message("user", _text(row, field, "response").strip())]
        turns = _plain_turns(row, field)
        if answers := [turn.content for turn in turns if turn.role == "assistant"]:
            return [Message("user", answers[-1])]
    return _prompt_turns(row)


def _asking(turns: list[Message], field: str) -> list[Message]:
    if not turns or turns[-1].role != "user":
        raise _BadRow(f"no request: field {field!r} must end with a user turn")
    return turns


def _turns(row: Row, field: str) -> list[Message]:
    """The turns of a conversation, checked, behind the system text of its row."""
    turns = _plain_turns(row, field)
    return turns if turns[0].role == "system" else [*_system(row), *turns]


def _plain_turns(row: Row, field: str) -> list[Message]:
    given = row[field]
    if not isinstance(given, list) or not given:
        raise _BadRow(f"wrong type: field {field!r} must be a list of turns")
    turns = []
    for number, turn in enumerate(given, start=1):
        where = f"field {field!r}, turn {number}"
        if not isinstance(turn, Mapping):
            raise _BadRow(f"wrong type: {where} must be an object")
        turn = {name: value for name, value in turn.items() if value is not None}
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in _ROLES:
            raise _BadRow(f"wrong type: {where} needs 'role', one of {sorted(_ROLES)}")
        content = turn.get("content", turn.get("value"))
        if not isinstance(content, str):
            raise _BadRow(f"wrong type: {where} has no text in 'content'")
        weight = turn.get("weight")
        if weight not in (None, 0, 1):
            raise _BadRow(f"wrong type: {where} has a 'weight' that is not 0 or 1")
        turns.append(_turn(_ROLES[role], content, where, supervised=weight != 0))
    return turns


def _turn(role: str, content: str, where: str, supervised: bool = True) -> Message:
    if role != "system" and not content.strip():
        raise _BadRow(f"empty {'response' if role == 'assistant' else 'request'}: {where}")
    return Message(role, content.strip() if role == "assistant" else content.rstrip(), supervised)


def _system(row: Row) -> list[Message]:
    """The `system` column that some sets have beside an instruction or a conversation."""
    text = row.get("system", "")
    if not isinstance(text, str):
        raise _BadRow(f"wrong type: field 'system' must be text, found {type(text).__name__}")
    return [Message("system", text)] if text.strip() else []


def _history(row: Row) -> list[Message]:
    """LLaMA-Factory's `history`: earlier [user, assistant] turns."""
    history = row.get("history", [])
    pairs = history if isinstance(history, list) else [history]
    turns = []
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise _BadRow("wrong type: field 'history' must be a list of [user, assistant] texts")
        where = f"field 'history', turn {number}"
        turns += [_turn("user", pair[0], where), _turn("assistant", pair[1], where)]
    return turns


def _request(row: Row, field: str) -> str:
    text = _text(row, field, "request")
    # Dolly calls the given text `context`.
    extra = row.get("input", row.get("context", "")) if field == "instruction" else ""
    if not isinstance(extra, str):
        raise _BadRow(f"wrong type: field 'input' must be text, found {type(extra).__name__}")
    return (f"{text}\n\n{extra}" if extra.strip() else text).rstrip()


def _text(row: Row, field: str, what: str = "text") -> str:
    value = row[field]
    if not isinstance(value, str):
        raise _BadRow(f"wrong type: field {field!r} must be text, found {type(value).__name__}")
    if not value.strip():
        raise _BadRow(f"empty {what}: field {field!r}")
    return value
