"""Training rows as people read them, with the supervised tokens marked."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from humpback_jax.text.template import Rendered
from humpback_jax.text.tokenize import tokenize_batch
from humpback_jax.text.tokenizer import Tokenizer

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
OPEN, CLOSE = "\u27e6", "\u27e7"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def preview_lines(
    tokenizer: Tokenizer, rows: Sequence[tuple[str, Rendered]], colour: bool
) -> list[str]:
    """The rows as lines of text; what the loss counts is green, or else stands in ⟦ ⟧.

    The marks are drawn from the mask that training uses, not from the template's spans: a wrong
    mask shows.

    Raises:
      HumpbackError: a row with an empty answer.
    """
    lines: list[str] = []
    for row_id, rendered in rows:
        batch = tokenize_batch(tokenizer, [(row_id, rendered)], None, "drop")
        if not batch.examples:
            lines.append(f"--- {row_id}: left out ({batch.dropped[0].reason})")
            continue
        mask = batch.examples[0].mask
        _, offsets = tokenizer.encode_with_offsets(rendered.text)
        lines.append(f"--- {row_id}: {len(mask)} tokens, {int(mask.sum())} supervised")
        lines.extend(_marked(rendered.text, _spans(mask, offsets), colour))
    return lines


def _spans(mask: np.ndarray, offsets: np.ndarray) -> list[tuple[int, int]]:
    """Character spans of the runs of supervised tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [
        (int(offsets[first, 0]), int(offsets[end - 1, 1]))
        for first, end in zip(edges[::2], edges[1::2], strict=True)
    ]


def _marked(text: str, spans: Sequence[tuple[int, int]], colour: bool) -> list[str]:
    before, after = (GREEN, PLAIN) if colour else (OPEN, CLOSE)
    parts, place = [], 0
    for start, end in spans:
        inside = _visible(text[start:end])
        if colour:  # every line by itself, so that a pager or a cut keeps the colour right
            inside = inside.replace("\n", f"{after}\n{before}")
        parts += [_visible(text[place:start]), before, inside, after]
        place = end
    parts.append(_visible(text[place:]))
    return "".join(parts).split("\n")


def _visible(text: str) -> str:
    """Control characters as pictures: a text must not steer the reader's terminal."""
    return _CONTROL.sub(
        lambda found: "\u2421" if found[0] == "\x7f" else chr(0x2400 + ord(found[0])), text
    )
