"""Which held-out pairs the model's window holds, in every form that a run asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from humpback_jax.curators import PairText, rating_forms
from humpback_jax.errors import HumpbackError
from humpback_jax.evaluation.meters import with_promotion
from humpback_jax.inference import holds
from humpback_jax.models import LanguageModel
from humpback_jax.records import Example


def fitting_pairs(
    base: LanguageModel, config: Any, pairs: Sequence[Example]
) -> tuple[list[Example], list[str]]:
    """(the pairs that fit, ids of those that do not): the latter would stop a run at its end.

    Raises:
      HumpbackError: none fits.
    """
    longest = max((pair.instruction for pair in pairs), key=len, default="")
    fitting, too_long = [], []
    for pair in pairs:
        if all(holds(base, *form) for form in _forms(base, config, pair, longest)):
            fitting.append(pair)
        else:
            too_long.append(pair.id)
    if too_long and not fitting:
        raise HumpbackError(
            f"data.heldout: none of {len(too_long)} pairs fits the window of {base.name}, "
            f"{base.config.max_position_embeddings} tokens, with what is asked about them. Shorten "
            "them, or lower augment.max_new_tokens, curate.max_new_tokens and "
            "evaluate.answer_tokens."
        )
    return fitting, too_long


def _forms(
    base: LanguageModel, config: Any, pair: Example, instruction: str
) -> Iterator[tuple[str, int]]:
    """(text, tokens written after it) of what evaluation, answers and meters make of a pair.

    Args:
      instruction: the longest of all: the meter gives a pair that of another one.
    """
    template, chat = base.template, pair.chat()
    for tags in (*config.evaluate.tags, "both"):
        yield template.forward(chat, tags).text, 0
        yield template.forward_prompt(chat[:-1], tags), config.evaluate.answer_tokens
    yield template.backward_prompt(pair.response), config.augment.max_new_tokens
    promoted = with_promotion(pair.response, pair.id)
    for curator in {config.curate.curator, *config.meters.curators}:
        rated = PairText(pair.id, instruction, promoted)
        yield from rating_forms(curator, template, rated, config.curate.max_new_tokens)
