"""Rows as training texts and tokens: tagged by source forwards, turned round backwards."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from humpback_jax.errors import HumpbackError
from humpback_jax.models import LanguageModel
from humpback_jax.records import Example
from humpback_jax.text.template import Rendered, Tags, Template
from humpback_jax.text.tokenize import Dropped, tokenize_batch
from humpback_jax.training.examples import TrainingExample

Direction = Literal["forward", "backward"]
# Source tags of the paper (section 2.3): what a row carries in training.
TAGS_BY_SOURCE: dict[str, Tags] = {"seed": "S_a", "web": "S_w"}


def tokenized_examples(
    base: LanguageModel, examples: Sequence[Example], section: Any, direction: Direction
) -> tuple[list[TrainingExample], dict[str, int]]:
    """(what `tune` takes, the number of rows dropped by reason).

    Raises:
      HumpbackError: no example is left, or one is refused (`on_long="error"`).
    """
    rows = render(base.template, examples, direction)
    batch = tokenize_batch(base.tokenizer, rows, token_limit(base, section), section.on_long)
    if not batch.examples:
        raise none_left(len(examples), batch.drop_counts())
    sources = {example.id: example.source for example in examples}
    tokenized = [TrainingExample(e.id, e.ids, e.mask, sources[e.id]) for e in batch.examples]
    return tokenized, batch.drop_counts()


def token_limit(base: LanguageModel, section: Any) -> int:
    """Tokens of the longest example that fits both a row and the model's window."""
    return int(min(section.row_tokens + 1, base.config.max_position_embeddings))


def none_left(rows: int, dropped: dict[str, int]) -> HumpbackError:
    """What to tell a user all of whose rows were dropped."""
    return HumpbackError(
        f"no training example is left of {rows}: {dropped}. Raise row_tokens or shorten the rows."
    )


def render(
    template: Template, examples: Sequence[Example], direction: Direction
) -> list[tuple[str, Rendered]]:
    """Examples as training texts: tagged by source forwards, pairs turned round backwards.

    Of a conversation, the first pair is turned round: later ones cannot be told without it.

    Raises:
      HumpbackError: a row that has no such text; names it.
    """
    return [(example.id, _rendered(template, example, direction)) for example in examples]


def render_usable(
    template: Template, examples: Iterable[Example], direction: Direction, skip_bad: bool
) -> tuple[list[tuple[str, Rendered]], list[Dropped]]:
    """As `render`; with `skip_bad`, beside the rows that have no such text.

    Many chat templates refuse some conversations, such as two requests in a row.
    """
    rows, refused = [], []
    for example in examples:
        try:
            rows += render(template, [example], direction)
        except HumpbackError:
            if not skip_bad:
                raise
            refused.append(Dropped(example.id, "refused_by_template"))
    return rows, refused


def validation_examples(
    base: LanguageModel,
    examples: Sequence[Example],
    section: Any,
    direction: Direction,
    skip_bad: bool = False,
) -> tuple[list[TrainingExample], dict[str, int]]:
    """(the rows that `eval_every` measures, the number of rows left out by reason).

    What is too long is left out whatever `on_long` says: a part of it would be another row.

    Raises:
      HumpbackError: nothing is left that `eval_every` could measure.
    """
    found: list[TrainingExample] = []
    dropped: collections.Counter[str] = collections.Counter()
    # Source by source: their ids may be the same.
    for source in sorted({example.source for example in examples}):
        chosen = [example for example in examples if example.source == source]
        rows, refused = render_usable(base.template, chosen, direction, skip_bad)
        batch = tokenize_batch(base.tokenizer, rows, token_limit(base, section), "drop")
        found += [TrainingExample(e.id, e.ids, e.mask, source) for e in batch.examples]
        dropped.update([each.reason for each in (*refused, *batch.dropped)])
    if examples and section.eval_every and not found:
        raise HumpbackError(f"held-out rows: {none_left(len(examples), dict(dropped))}")
    return found, dict(dropped)


def _rendered(template: Template, example: Example, direction: Direction) -> Rendered:
    try:
        if direction == "forward":
            return _forward(template, example)
        if example.text is None:
            pair = example.opening()
            return template.backward(pair.response, pair.instruction)
        raise HumpbackError("plain text has no instruction to learn; remove it.")
    except HumpbackError as error:
        raise HumpbackError(f"row {example.id}: {error}") from error


def _forward(template: Template, example: Example) -> Rendered:
    if example.text is not None:
        return template.plain_text(example.text)
    return template.forward(example.chat(), TAGS_BY_SOURCE.get(example.source, "none"))
