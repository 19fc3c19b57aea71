"""Which held-out pairs the model's window holds, in every form that a run asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from humpback_jax.curators import PairText, require_rateable
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
        fits = all(holds(base, *form) for form in _forms(base, config, pair))
        if fits and _rateable(base, config, pair, longest):
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


def _forms(base: LanguageModel, config: Any, pair: Example) -> Iterator[tuple[str, int]]:
    """(text, tokens written after it) of what evaluation and answers make of a pair, and M_yx."""
    template, chat = base.template, pair.chat()
    for tags in (*config.evaluate.tags, "both"):
        yield template.forward(chat, tags).text, 0
        yield template.forward_prompt(chat[:-1], tags), config.evaluate.answer_tokens
    yield template.backward_prompt(pair.response), config.augment.max_new_tokens


def _rateable(base: LanguageModel, config: Any, pair: Example, instruction: str) -> bool:
    """Whether the meters' curators can rate the pair, also with the longest instruction of all."""
    broken = PairText(pair.id, instruction, with_promotion(pair.response, pair.id))
    try:
        for curator in {config.curate.curator, *config.meters.curators}:
            require_rateable(base, curator, broken)
    except HumpbackError:
        return False
    return True
