"""Rendered text to token ids and the mask of what is trained."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from humpback_jax.errors import HumpbackError
from humpback_jax.text.template import Rendered
from humpback_jax.text.tokenizer import Offsets, Tokenizer

OnLong = Literal["error", "drop", "truncate"]
TOO_LONG, NOTHING_SUPERVISED = "too_long", "no_supervised_token"


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedExample:
    """One row as the trainer and the likelihood scorer take it.

    Attributes:
      id: the row's id.
      ids: [n] int32.
      mask: [n] bool; token i is supervised as a target. Says nothing about token values, so that
        padding with EOS, or EOS inside a prompt, changes nothing.
    """

    id: str
    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A row that was left out: `too_long`, `no_supervised_token`, or `refused_by_template`."""

    id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class TokenizedBatch:
    examples: tuple[TokenizedExample, ...]
    dropped: tuple[Dropped, ...]

    def drop_counts(self) -> dict[str, int]:
        return dict(collections.Counter(row.reason for row in self.dropped))


def tokenize_example(
    tokenizer: Tokenizer,
    rendered: Rendered,
    max_tokens: int | None,
    on_long: OnLong,
    row_id: str,
) -> TokenizedExample | Dropped:
    """Tokenises one row; see `tokenize_batch`."""
    batch = tokenize_batch(tokenizer, [(row_id, rendered)], max_tokens, on_long)
    return batch.examples[0] if batch.examples else batch.dropped[0]


def tokenize_batch(
    tokenizer: Tokenizer,
    rows: Iterable[tuple[str, Rendered]],
    max_tokens: int | None,
    on_long: OnLong,
) -> TokenizedBatch:
    """Tokenises (id, rendered) rows, each once, and marks the supervised tokens.

    A token is supervised iff it starts inside a span: one that began in the prompt belongs to the
    prompt. For vocabularies that drop white space at the end of a text, that between a prompt and a
    span is not in the prompt, and belongs to the span.

    Rows over `max_tokens` are an error, dropped, or cut to their first `max_tokens` tokens; a cut
    answer has no EOS, so the model does not learn to stop in mid-sentence.

    Raises:
      HumpbackError: an empty answer; with on_long="error" also a row that is too long or has
        nothing to learn. The message names the row.
    """
    named = list(rows)
    for row_id, rendered in named:
        _require_answers(tokenizer, rendered, row_id)
    drops_space = tokenizer.encode("a\n") == tokenizer.encode("a")
    encoded = tokenizer.encode_batch_with_offsets([rendered.text for _, rendered in named])
    examples, dropped = [], []
    for (row_id, rendered), (ids, offsets) in zip(named, encoded, strict=True):
        spans = rendered.spans
        if drops_space:
            spans = tuple((len(rendered.text[:begin].rstrip()), end) for begin, end in spans)
        mask = _supervised(offsets, spans)
        reason = None
        if max_tokens is not None and len(ids) > max_tokens:
            if on_long == "truncate":
                ids, mask = ids[:max_tokens], mask[:max_tokens]
            else:
                reason = TOO_LONG
        if reason is None and not mask.any():
            reason = NOTHING_SUPERVISED
        if reason is None:
            examples.append(TokenizedExample(row_id, ids, mask))
        elif on_long == "error":
            raise HumpbackError(_explain(row_id, reason, len(ids), max_tokens))
        else:
            dropped.append(Dropped(row_id, reason))
    return TokenizedBatch(tuple(examples), tuple(dropped))


def _supervised(offsets: Offsets, spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    starts = offsets[:, 0]
    mask = np.zeros(len(starts), np.bool_)
    for begin, end in spans:
        mask |= (starts >= begin) & (starts < end)
    return mask


def _require_answers(tokenizer: Tokenizer, rendered: Rendered, row_id: str) -> None:
    for begin, end in rendered.spans:
        answer = rendered.text[begin:end]
        for eos in tokenizer.eos_texts:
            answer = answer.removesuffix(eos)
        if not answer.strip():
            raise HumpbackError(
                f"Row {row_id}: an assistant turn is empty; give it a text or remove the row."
            )


def _explain(row_id: str, reason: str, tokens: int, max_tokens: int | None) -> str:
    if reason == TOO_LONG:
        return (
            f"Row {row_id}: {tokens} tokens, more than the limit of {max_tokens}; raise the limit, "
            "or set on_long to drop or truncate."
        )
    return f"Row {row_id}: no token is supervised, so there is nothing to learn; remove the row."
