"""The rows of the pipeline, in the order in which data flows through it."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

NO_ROOM = "no_room"  # finish_reason where the window cannot hold the prompts: no text is drawn


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
      role: "system", "user" or "assistant".
      supervised: False for an assistant's turn that is context only, and not to be learnt.
    """

    role: str
    content: str
    supervised: bool = True


@dataclasses.dataclass(frozen=True)
class Example:
    """A training or evaluation row in the one form used inside.

    Attributes:
      source: where it comes from: "seed", "web", or the name of another set. Decides the tags.
      text: for rows of plain text, which have no messages.
    """

    id: str
    messages: tuple[Message, ...]
    source: str
    text: str | None = None

    def chat(self) -> list[dict[str, Any]]:
        """The turns as templates take them."""
        return [dataclasses.asdict(message) for message in self.messages]

    @property
    def instruction(self) -> str:
        """x: the last user turn."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")

    @property
    def response(self) -> str:
        """y: the last assistant turn."""
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")

    def opening(self) -> Example:
        """The pair that a conversation begins with: no other turn is needed to understand it."""
        turns = [
            next((m for m in self.messages if m.role == r), None) for r in ("user", "assistant")
        ]
        return dataclasses.replace(self, messages=tuple(m for m in turns if m is not None))


@dataclasses.dataclass(frozen=True)
class Segment:
    """A self-contained part of a document: the unlabelled y_j.

    Attributes:
      start, end: byte span in the document's UTF-8 text. rules: version of the extraction rules.
    """

    id: str
    document_id: str
    start: int
    end: int
    heading: str
    text: str
    source: str
    rules: str


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An instruction x̂ drawn from M_yx for a segment, and everything that determined it."""

    id: str
    segment_id: str
    instruction: str
    response: str
    raw: str
    draw: int
    finish_reason: str
    logprob: float
    tokens: int
    model_hash: str
    template_hash: str
    decoding: str


@dataclasses.dataclass(frozen=True)
class Score:
    """A curator's rating of a candidate; `value` is None where it gave none.

    Attributes:
      detail: JSON: the distribution, the log-probabilities or the raw rating.
    """

    candidate_id: str
    curator: str
    value: float | None
    detail: str
    model_hash: str
    template_hash: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """The decision on a candidate in one round; rejected ones are kept, with the reason."""

    id: str
    candidate_id: str
    instruction: str
    response: str
    source: str
    score: float | None
    selected: bool
    reason: str

    def example(self) -> Example:
        """The training row."""
        turns = (Message("user", self.instruction), Message("assistant", self.response))
        return Example(self.id, turns, self.source)


def stable_id(*parts: str) -> str:
    """First 16 hex digits of sha256 over the length-prefixed parts."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]
