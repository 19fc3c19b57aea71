"""What a Markdown or reStructuredText document is made of: headers, code, paragraph starts."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_UNDERLINE = re.compile(r"([*=\-^~\"'`+#.:_])\1{2,}$")
_MARKDOWN = re.compile(r"(#{1,6})\s+(?=\S)")
_CLOSING_HASHES = re.compile(r"(^|\s)#+$")
_WRAPPED = 120  # a longer line is a paragraph of its own: pages' text often has no blank lines
_FENCE = re.compile(r"\s*(?P<mark>`{3,}|~{3,})(?P<info>[^`]*)$")
_FRONT_MATTER = {
    "---": ("---", "..."),
    "+++": ("+++",),
}  # YAML and TOML: their first and last lines
_FIELD = re.compile(r"[\w-]+\s*[:=]|\[")
_OF_FIELD = re.compile(r"[\s#\-\]}]")  # its list, comment or continuation
_LIST_ITEM = re.compile(r"(\*|-|\+|•|\||#\.|\d+[.)]|\w[.)]|\(\w{1,3}\))(\s|$)")


class Line(NamedTuple):
    """A line without its end and trailing white space.

    Attributes:
      start, end: its characters, [start, end), with the newline.
      in_code: between code fences, or one of them.
    """

    start: int
    end: int
    text: str
    in_code: bool


@dataclasses.dataclass(frozen=True)
class Heading:
    """A header: its level from 1, its title, where it starts and where its body starts."""

    level: int
    title: str
    start: int
    body: int


def read_lines(text: str) -> list[Line]:
    """The lines of a document, in time that grows with its length alone."""
    wholes = text.split("\n")
    bares = [whole.rstrip() for whole in wholes]
    closing = {mark: _closing_marks(bares, mark) for mark in "`~" if mark * 3 in text}
    lines: list[Line] = []
    place, fence = 0, ""
    for number, (whole, bare) in enumerate(zip(wholes, bares, strict=True)):
        end = min(place + len(whole) + 1, len(text))
        closed = bool(fence) and _closes(bare, fence)
        if not fence and ("```" in bare or "~~~" in bare):
            mark = _opened(lines, bare)
            # What nothing closes is a slip, or a mark of something else: all below would be code.
            fence = mark if mark and len(mark) <= closing[mark[0]][number] else ""
        lines.append(Line(place, end, bare, bool(fence)))
        fence = "" if closed else fence
        place = end
    return lines


def _closing_marks(bares: Sequence[str], mark: str) -> list[int]:
    """For each line, the longest closing mark among the lines below it, by its length."""
    runs = [bare.lstrip() for bare in reversed(bares)]
    lengths = (0 if run.strip(mark) else len(run) for run in runs)
    return [0, *itertools.accumulate(lengths, max)][-2::-1]


def _opened(before: Sequence[Line], bare: str) -> str:
    """The mark of the fence that a line opens, or "".

    A bare run of tildes or backticks is also an underline of reStructuredText.
    """
    match = _FENCE.match(bare)
    if not match:
        return ""
    mark = match["mark"]
    title = before[-1].text if before and _after_blank(before, len(before) - 1) else ""
    is_underline = (
        bare == mark and _is_title(title, mark) and not title.endswith(":") and mark != "```"
    )
    return "" if is_underline else mark


def _closes(bare: str, fence: str) -> bool:
    mark = bare.lstrip()
    return len(mark) >= len(fence) and not mark.strip(fence[0])


def after_front_matter(lines: Sequence[Line]) -> int:
    """Where a page's text begins: behind the fields that site generators want at its very top.

    0 where there are none. What has a blank line, or one that is no field, is text between rules.
    """
    last = _FRONT_MATTER.get(lines[0].text, ())
    for number, line in enumerate(lines[1:]):
        if number and line.text in last:
            return line.end
        if not (_FIELD.match(line.text) or (number and _OF_FIELD.match(line.text))):
            break
    return 0


def headings(lines: Sequence[Line]) -> list[Heading]:
    """Markdown (`## title`) and underlined, also overlined, headers outside code fences."""
    found: list[Heading] = []
    levels: dict[tuple[str, bool], int] = {}
    for number, line in enumerate(lines):
        if line.in_code or not line.text:
            continue
        if match := _MARKDOWN.match(line.text):
            title = _CLOSING_HASHES.sub("", line.text[match.end() :]).rstrip()
            found.append(Heading(len(match[1]), title, line.start, line.end))
            continue
        under = lines[number + 1] if number + 1 < len(lines) else line
        if under.in_code or not _is_title(line.text, under.text):
            continue
        overlined = _is_overlined(lines, number)
        if overlined or (_after_blank(lines, number) and not line.text[0].isspace()):
            level = levels.setdefault((under.text[0], overlined), len(levels) + 1)
            start = lines[number - 1].start if overlined else line.start
            found.append(Heading(level, line.text.strip(), start, under.end))
    return found


def _is_title(title: str, under: str) -> bool:
    return bool(
        title
        and _UNDERLINE.match(under)
        and len(under) >= len(title) * 0.8
        and not _UNDERLINE.match(title)
    )


def _is_overlined(lines: Sequence[Line], number: int) -> bool:
    return (
        number > 0
        and lines[number - 1].text == lines[number + 1].text
        and _after_blank(lines, number - 1)
    )


def _after_blank(lines: Sequence[Line], number: int) -> bool:
    return number == 0 or not lines[number - 1].text


def paragraph_starts(lines: Sequence[Line]) -> Iterator[int]:
    """Where a text may be cut: before a paragraph that continues no list, code or lead-in."""
    before = ""
    for number, line in enumerate(lines):
        if not line.text:
            continue
        if (
            before
            and not (line.in_code and lines[number - 1].in_code)
            and (_after_blank(lines, number) or max(len(before), len(line.text)) > _WRAPPED)
            and not line.text[0].isspace()
            and not _LIST_ITEM.match(line.text)
            and not before.endswith(":")
        ):
            yield line.start
        before = line.text
