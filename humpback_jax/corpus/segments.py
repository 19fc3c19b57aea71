"""Self-contained segments: a document's header tree, cut to the paper's length window.

A segment is the text under a header with the sub-headers below it (section 2.1, appendix E). The
header itself is not part of the segment: shown to the backward model it would give the answer away.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from humpback_jax.corpus.documents import Document
from humpback_jax.records import Segment, stable_id

RULES = "headings-1"
_UNDERLINE = re.compile(r"^([*=\-^~\"'`+#.:_])\1{2,}$")
_MARKDOWN = re.compile(r"^(#{1,6})\s+(.*?)\s*#*$")
_FENCE = re.compile(r"^\s*(```|~~~)")
_LIST_ITEM = re.compile(r"^(\*|-|\+|\d+[.)]|\w[.)]|\|)\s")
_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*?(?=[^\n])")


@dataclasses.dataclass(frozen=True)
class Heading:
    """A header line: its level from 1, its title, where it starts and where its body starts."""

    level: int
    title: str
    start: int
    body: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of characters [start, end) of a document under a header; None where it has none."""

    start: int
    end: int
    heading: str | None


def headings(text: str) -> list[Heading]:
    """Markdown (`## title`) and underlined (reStructuredText) headers, outside code fences."""
    found: list[Heading] = []
    underline_levels: dict[str, int] = {}
    lines = text.splitlines(keepends=True)
    place, fenced = 0, False
    starts = []
    for line in lines:
        starts.append(place)
        place += len(line)
    for number, line in enumerate(lines):
        bare = line.rstrip()
        after_blank = number == 0 or not lines[number - 1].strip()
        if _FENCE.match(bare) and (after_blank or not _UNDERLINE.match(bare)):
            fenced = not fenced
        if fenced or not bare or bare[0].isspace():
            continue
        if match := _MARKDOWN.match(bare):
            body = starts[number] + len(line)
            found.append(Heading(len(match[1]), match[2].strip(), starts[number], body))
        elif (
            number + 1 < len(lines)
            and (match := _UNDERLINE.match(under := lines[number + 1].rstrip()))
            and len(under) >= len(bare) * 0.8
            and after_blank
            and not _UNDERLINE.match(bare)
        ):
            level = underline_levels.setdefault(match[1], len(underline_levels) + 1)
            body = starts[number + 1] + len(lines[number + 1])
            found.append(Heading(level, bare, starts[number], body))
    return found


def pieces(text: str, min_chars: int, max_chars: int) -> Iterator[Piece]:
    """Cuts a document; every character outside headers lies in exactly one piece.

    A header's whole subtree is one piece if it fits; else its introduction and each child are
    cut on their own, and a text too long without sub-headers is cut between paragraphs. Pieces
    shorter than `min_chars` come out too: the length filter counts them.
    """
    found = headings(text)
    top = found[0].start if found else len(text)
    if text[:top].strip():
        yield from _by_paragraphs(text, Piece(0, top, None), max_chars)
    ends = [
        next((h.start for h in found[i + 1 :] if h.level <= heading.level), len(text))
        for i, heading in enumerate(found)
    ]
    index = 0
    while index < len(found):
        heading, end = found[index], ends[index]
        whole = _stripped(text, Piece(heading.body, end, heading.title))
        if whole.end - whole.start <= max_chars:
            yield whole
            while index < len(found) and found[index].start < end:
                index += 1
            continue
        own_end = found[index + 1].start if index + 1 < len(found) else len(text)
        intro = Piece(heading.body, min(own_end, end), heading.title)
        if text[intro.start : intro.end].strip():
            yield from _by_paragraphs(text, intro, max_chars)
        index += 1


def _by_paragraphs(text: str, piece: Piece, max_chars: int) -> Iterator[Piece]:
    """Runs of whole paragraphs of about equal size, each at most `max_chars` where that can be."""
    whole = _stripped(text, piece)
    starts = [whole.start, *_breaks(text, whole), whole.end]
    total = whole.end - whole.start
    target = total / max(-(-total // max_chars), 1)
    start = whole.start
    for cut, following in zip(starts[1:], [*starts[2:], whole.end], strict=True):
        if cut == whole.end or following - start > max_chars or cut - start >= target:
            run = _stripped(text, Piece(start, cut, piece.heading))
            if run.end > run.start:
                yield run
            start = cut


def _breaks(text: str, piece: Piece) -> list[int]:
    """Where a new run may begin: before a paragraph that continues no list, code or lead-in."""
    places = []
    for match in _BLANK_LINES.finditer(text, piece.start, piece.end):
        after = match.end()
        before = text[piece.start : match.start()].rstrip()
        line = text[after : text.find("\n", after) if "\n" in text[after:] else len(text)]
        opens_fence = text.count("```", piece.start, after) % 2 == 1
        if not (
            line[:1].isspace()
            or _LIST_ITEM.match(line)
            or before.endswith((":", "::"))
            or opens_fence
        ):
            places.append(after)
    return places


def _stripped(text: str, piece: Piece) -> Piece:
    body = text[piece.start : piece.end]
    # A first line keeps its indentation: it may be code.
    lead = len(body) - len(body.lstrip("\n\r \t"))
    lead = body.rfind("\n", 0, lead) + 1 if "\n" in body[:lead] else lead
    start = piece.start + lead if body.strip() else piece.end
    end = piece.start + len(body.rstrip()) if body.strip() else piece.end
    return Piece(start, end, piece.heading)


def segments(document: Document, min_chars: int, max_chars: int) -> Iterator[tuple[Segment, bool]]:
    """(segment, whether it stands under a header) with exact byte spans in the document."""
    text = document.text
    before, place = 0, 0  # bytes before character `place`
    for piece in pieces(text, min_chars, max_chars):
        before += len(text[place : piece.start].encode())
        place = piece.start
        body = text[piece.start : piece.end]
        end = before + len(body.encode())
        segment = Segment(
            id=stable_id(document.id, str(before), str(end), body),
            document_id=document.id,
            start=before,
            end=end,
            heading=piece.heading or "",
            text=body,
            source=document.source,
            rules=RULES,
        )
        yield segment, piece.heading is not None


def choose(found: Sequence[Segment], count: int, seed: int) -> list[Segment]:
    """`count` segments by a hash of (seed, id), so that more documents replace few of them."""
    ranked = sorted(found, key=lambda segment: stable_id(str(seed), segment.id))
    kept = {segment.id for segment in ranked[:count]}
    return [segment for segment in found if segment.id in kept]
