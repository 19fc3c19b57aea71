"""Named rules that a segment must pass; the first one it fails is its reason.

Lengths, header quality and repetition follow appendix E; the alphabetic share, the line length and
every threshold that the paper does not give are ours.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from humpback_jax.corpus.documents import Document
from humpback_jax.corpus.segments import segments
from humpback_jax.records import Segment, stable_id

MIN_ALPHABETIC = 0.6
MIN_LINE_CHARS = 20
MAX_SENTENCE_JACCARD = 0.8
SHINGLE = 3
NAVIGATION = (
    "advertisement",
    "forum",
    "quick link",
    "newsletter",
    "navigation",
    "sitemap",
    "site map",
    "log in",
    "sign up",
    "subscribe",
    "related posts",
    "share this",
    "cookies? (policy|notice|banner|consent|preference|setting)",
    "all rights reserved",
)
# Whole words only: a "dialog interface" asks nobody to log in.
_NAVIGATION = re.compile(rf"\b({'|'.join(NAVIGATION)})s?\b", re.IGNORECASE)
RULES = (
    "length",
    "heading_quality",
    "heading_navigation",
    "alphabetic",
    "line_length",
    "repetition",
    "duplicate",
)


def extract_segments(
    documents: Iterable[Document], *, min_chars: int = 600, max_chars: int = 3000
) -> tuple[list[Segment], list[tuple[Segment, str]], dict[str, Any]]:
    """Segments of all documents that pass every rule.

    Returns:
      (kept, rejected with their rule, counts {"segments", "kept", "rejected": {rule: n}}), where
      segments = kept + all rejected.
    """
    kept: list[Segment] = []
    rejected: list[tuple[Segment, str]] = []
    seen: set[str] = set()
    for document in documents:
        for segment, has_heading in segments(document, max_chars):
            rule = failed_rule(segment, has_heading, seen, min_chars, max_chars)
            if rule is None:
                seen.add(_fingerprint(segment.text))
                kept.append(segment)
            else:
                rejected.append((segment, rule))
    reasons = {rule: sum(reason == rule for _, reason in rejected) for rule in RULES}
    counts = {
        "segments": len(kept) + len(rejected),
        "kept": len(kept),
        "rejected": {rule: count for rule, count in reasons.items() if count},
    }
    return kept, rejected, counts


def failed_rule(
    segment: Segment, has_heading: bool, seen: set[str], min_chars: int, max_chars: int
) -> str | None:
    """The first rule of `RULES` that the segment fails, or None.

    Args:
      seen: fingerprints of the segments kept so far.
    """
    text, heading = segment.text, segment.heading
    if not min_chars <= len(text) <= max_chars:
        return "length"
    letters = [c for c in heading if c.isalpha()]
    if has_heading and (not letters or (len(letters) > 3 and all(c.isupper() for c in letters))):
        return "heading_quality"
    if _NAVIGATION.search(heading):
        return "heading_navigation"
    visible = [c for c in text if not c.isspace()]
    if sum(map(_is_letter, visible)) < MIN_ALPHABETIC * len(visible):
        return "alphabetic"
    lines = [line for line in text.splitlines() if line.strip()]
    if sum(map(len, lines)) < MIN_LINE_CHARS * len(lines):
        return "line_length"
    if repeats_sentences(text):
        return "repetition"
    if _fingerprint(text) in seen:
        return "duplicate"
    return None


def repeats_sentences(text: str) -> bool:
    """Whether two sentences share `MAX_SENTENCE_JACCARD` of their word trigrams."""
    shingled = []
    for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
        words = _words(sentence.lower())
        grams = {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}
        if len(grams) >= SHINGLE:
            shingled.append(grams)
    return any(
        len(a & b) >= MAX_SENTENCE_JACCARD * len(a | b)
        for i, a in enumerate(shingled)
        for b in shingled[i + 1 :]
    )


def _is_letter(character: str) -> bool:
    """Vowel signs, too, are letters: in Hindi or Burmese most syllables have one."""
    return unicodedata.category(character)[0] in "LM"


def _words(text: str) -> list[str]:
    """Runs of letters with their marks, digits and underscores; `\\w` breaks off at a mark."""
    shown = (c if c.isalnum() or c == "_" or _is_letter(c) else " " for c in text)
    return "".join(shown).split()


def _fingerprint(text: str) -> str:
    """Equal for texts that differ in case and white space alone."""
    return stable_id(" ".join(text.lower().split()))
