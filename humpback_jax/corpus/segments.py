"""Self-contained segments: a document's header tree, cut to the paper's length window.

A segment is the text under a header with the sub-headers below it (section 2.1, appendix E). The
header itself is not part of the segment: shown to the backward model it would give the answer away.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

from humpback_jax.corpus.documents import Document
from humpback_jax.corpus.structure import (
    Heading,
    after_front_matter,
    headings,
    paragraph_starts,
    read_lines,
)
from humpback_jax.records import Segment, stable_id

RULES = "headings-7"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of characters [start, end) of a document under a header; None where it has none."""

    start: int
    end: int
    heading: str | None


def pieces(text: str, max_chars: int) -> Iterator[Piece]:
    """Cuts a document; each visible character outside headers and front matter is in one piece.

    A header's whole subtree is one piece if it fits; else its introduction and each child are
    cut on their own, and a text too long without sub-headers is cut between paragraphs. Short
    pieces come out too: the length filter counts them.
    """
    lines = read_lines(text)
    begin = after_front_matter(lines)
    found = [heading for heading in headings(lines) if heading.start >= begin]
    cuts = list(paragraph_starts(lines))
    top = found[0].start if found else len(text)
    yield from _by_paragraphs(text, Piece(begin, top, None), cuts, max_chars)
    ends = _subtree_ends(found, len(text))
    index = 0
    while index < len(found):
        heading, end = found[index], ends[index]
        whole = _stripped(text, Piece(heading.body, end, heading.title))
        index += 1
        if whole.end - whole.start <= max_chars:
            if whole.end > whole.start:
                yield whole
            while index < len(found) and found[index].start < end:
                index += 1
        else:
            own_end = found[index].start if index < len(found) else len(text)
            own = Piece(heading.body, own_end, heading.title)
            yield from _by_paragraphs(text, own, cuts, max_chars)


def _subtree_ends(found: Sequence[Heading], length: int) -> list[int]:
    """Where each header's subtree ends: at the next header of its level or above."""
    ends = [length] * len(found)
    opened: list[int] = []
    for index, heading in enumerate(found):
        while opened and found[opened[-1]].level >= heading.level:
            ends[opened.pop()] = heading.start
        opened.append(index)
    return ends


def _by_paragraphs(text: str, piece: Piece, cuts: Sequence[int], max_chars: int) -> Iterator[Piece]:
    """Runs of whole paragraphs of about equal size, each at most `max_chars` where that can be."""
    whole = _stripped(text, piece)
    if whole.start == whole.end:
        return
    first = bisect.bisect_right(cuts, whole.start)
    inside = cuts[first : bisect.bisect_left(cuts, whole.end)]
    total = whole.end - whole.start
    target = total / -(-total // max_chars)
    start = whole.start
    for cut, following in zip(inside, [*inside, whole.end][1:], strict=True):
        if following - start > max_chars or cut - start >= target:
            yield _stripped(text, Piece(start, cut, piece.heading))
            start = cut
    yield _stripped(text, Piece(start, whole.end, piece.heading))


def _stripped(text: str, piece: Piece) -> Piece:
    """The piece without white space around it; empty where it is blank.

    The indentation of a first line goes, too: behind the line end of a prompt it would share its
    token, and the response's first token would not be learnt.
    """
    first, end = piece.start, piece.end
    while end > first and text[end - 1].isspace():
        end -= 1
    while first < end and text[first].isspace():
        first += 1
    return Piece(first, end, piece.heading)


def segments(document: Document, max_chars: int) -> Iterator[tuple[Segment, bool]]:
    """(segment, whether it stands under a header) with exact byte spans in the document."""
    text = document.text
    before, place = 0, 0  # bytes before character `place`
    for piece in pieces(text, max_chars):
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
