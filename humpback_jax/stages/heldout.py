"""Which held-out pairs the model's window holds: as evaluation asks about them, and as meters do.

Evaluation leaves out none for what only the meters ask, so that runs that differ in curator or
augmentation are compared on the same pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from humpback_jax.curators import PairText, require_rateable
from humpback_jax.errors import HumpbackError
from humpback_jax.evaluation.meters import with_promotion
from humpback_jax.inference import holds
from humpback_jax.models import LanguageModel
from humpback_jax.records import Example


def fitting_pairs(
    base: LanguageModel, config: Any, pairs: Sequence[Example], name: str = "data.heldout"
) -> tuple[list[Example], list[str]]:
    """(the pairs that fit, ids of those that do not): the latter would stop a run at its end.

    Args:
      name: of the pairs, for people.

    Raises:
      HumpbackError: none fits.
    """
    fitting, too_long = [], []
    for pair in pairs:
        if all(holds(base, *form) for form in _forms(base, config, pair)):
            fitting.append(pair)
        else:
            too_long.append(pair.id)
    if too_long and not fitting:
        raise HumpbackError(
            f"{name}: none of {len(too_long)} pairs fits the window of {base.name}, "
            f"{base.config.max_position_embeddings} tokens, with what is asked about them. Shorten "
            "them, or lower evaluate.answer_tokens."
        )
    return fitting, too_long


def _forms(base: LanguageModel, config: Any, pair: Example) -> Iterator[tuple[str, int]]:
    """(text, tokens written after it) of what evaluation and answers make of a pair."""
    template, chat = base.template, pair.chat()
    for tags in (*config.evaluate.tags, "both"):
        yield template.forward(chat, tags).text, 0
        yield template.forward_prompt(chat[:-1], tags), config.evaluate.answer_tokens


def meter_pairs(base: LanguageModel, config: Any, pairs: Sequence[Example]) -> list[Example]:
    """The first `meters.pairs` that M_yx can be asked about and the meters' curators can rate.

    Raises:
      HumpbackError: none of the pairs.
    """
    longest = max((pair.instruction for pair in pairs), key=len, default="")
    new = config.augment.max_new_tokens
    fitting = (
        pair
        for pair in pairs
        if holds(base, base.template.backward_prompt(pair.response), new)
        and _rateable(base, config, pair, longest)
    )
    found = list(itertools.islice(fitting, config.meters.pairs))
    if pairs and not found:
        raise HumpbackError(
            f"data.heldout: the window of {base.name}, {base.config.max_position_embeddings} "
            f"tokens, holds none of {len(pairs)} pairs with what the meters ask about them. "
            "Shorten them, or lower augment.max_new_tokens and curate.max_new_tokens."
        )
    return found


def _rateable(base: LanguageModel, config: Any, pair: Example, instruction: str) -> bool:
    """Whether the meters' curators can rate the pair, also with the longest instruction of all."""
    broken = PairText(pair.id, instruction, with_promotion(pair.response, pair.id))
    try:
        for curator in {config.curate.curator, *config.meters.curators}:
            require_rateable(base, curator, broken)
    except HumpbackError:
        return False
    return True
