"""Meters that run before money is spent: can the curator tell good pairs from broken ones, and does
the backward model write instructions that fit?
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from humpback_jax.curators import PairText, Rating
from humpback_jax.errors import HumpbackError
from humpback_jax.evaluation.statistics import Estimate, auc
from humpback_jax.inference import Generation
from humpback_jax.records import Example, stable_id
from humpback_jax.text.template import Template

PROMOTIONS = (
    "Sign up for our free newsletter and get 10 % off your first order!",
    "Share this page: Facebook | Twitter | Pinterest | E-mail",
    "Home » Products » Support » Contact us » Terms of use",
    "Click here to read more reviews and find the best deals near you.",
)
ECHO_WORDS = 5  # a run of this many words of the prompt's wording counts as an echo


@dataclasses.dataclass(frozen=True)
class CurationMeter:
    """AUC of a curator on true pairs against one kind of corruption."""

    auc: float
    n: int


def corruptions(examples: Sequence[Example]) -> dict[str, list[PairText]]:
    """True held-out pairs ("true") and three broken forms of each.

    "shuffled": the instruction of another pair (the next different one in an order by hash, so
    none keeps its own). "truncated": the response without its first half. "promo": navigation and
    advertising text put around and into the response.

    Raises:
      HumpbackError: there are not two different instructions.
    """
    wrong = _others(examples)
    kinds: dict[str, list[PairText]] = {"true": [], "shuffled": [], "truncated": [], "promo": []}
    for example in examples:
        x, y, name = example.instruction, example.response, example.id
        kinds["true"].append(PairText(name, x, y))
        kinds["shuffled"].append(PairText(f"{name}/shuffled", wrong[name], y))
        for kind, text in (("truncated", _second_half(y)), ("promo", with_promotion(y, name))):
            kinds[kind].append(PairText(f"{name}/{kind}", x, text))
    return kinds


def _others(examples: Sequence[Example]) -> dict[str, str]:
    """For each id the next different instruction, in an order by a hash of the ids."""
    ordered = sorted(examples, key=lambda e: stable_id("shuffle", e.id))
    if len({e.instruction for e in ordered}) < 2:
        raise HumpbackError(
            f"the curation meter has {len(ordered)} held-out pairs and needs two with different "
            "instructions; add some to data.heldout, or raise meters.pairs."
        )
    others = {}
    for place, example in enumerate(ordered):
        following = (ordered[(place + k) % len(ordered)].instruction for k in range(len(ordered)))
        others[example.id] = next(x for x in following if x != example.instruction)
    return others


def curation_meter(
    rate: Callable[[Sequence[PairText]], list[Rating]], examples: Sequence[Example]
) -> dict[str, CurationMeter]:
    """How well a curator separates true pairs from each corruption; unparsed ratings count lowest.

    Args:
      rate: the curator, applied to all pairs at once.
    """
    kinds = corruptions(examples)
    everything = [pair for pairs in kinds.values() for pair in pairs]
    values = {r.id: -np.inf if r.value is None else r.value for r in rate(everything)}
    scores = {kind: np.array([values[p.id] for p in pairs]) for kind, pairs in kinds.items()}
    true = scores.pop("true")
    return {
        kind: CurationMeter(_finite_auc(true, broken), len(broken))
        for kind, broken in scores.items()
    }


def _finite_auc(positive: np.ndarray, negative: np.ndarray) -> float:
    both = np.concatenate([positive, negative])
    finite = both[np.isfinite(both)]
    floor = finite.min() - 1 if len(finite) else 0.0
    return auc(np.maximum(positive, floor), np.maximum(negative, floor))


def _second_half(text: str) -> str:
    words = list(re.finditer(r"\S+", text))
    return text[words[len(words) // 2].start() :] if len(words) > 1 else text


def with_promotion(text: str, name: str) -> str:
    """A response with navigation and advertising around and in it, chosen by the pair's id."""
    start = int(stable_id("promo", name), 16)
    first, second = (PROMOTIONS[(start + k) % len(PROMOTIONS)] for k in (0, 1))
    middle = text.find("\n\n")
    if middle < 0:
        return f"{first}\n\n{text}\n\n{second}"
    return f"{first}\n\n{text[:middle]}\n\n{second}{text[middle:]}"


@dataclasses.dataclass(frozen=True)
class BackwardMeter:
    """What M_yx does on held-out pairs.

    Attributes:
      nll: nats a token of the true instruction given the response.
      lift: mean of (log p(y | x̂) - log p(y)) / |y| under the judge, for drawn instructions x̂.
      copy_rate: longest common substring of x̂ and y, as a share of x̂, on average.
      echo_rate: share of x̂ that repeat the wording of the prompt that M_yx was given.
      pass_rate: share of x̂ that the gates would let through to curation.
    """

    nll: Estimate
    lift: Estimate
    copy_rate: float
    echo_rate: float
    pass_rate: float

    def record(self) -> dict[str, Any]:
        return {
            "nll": self.nll.record(),
            "lift": self.lift.record(),
            "copy_rate": self.copy_rate,
            "echo_rate": self.echo_rate,
            "pass_rate": self.pass_rate,
        }


def backward_meter(
    examples: Sequence[Example],
    generations: Sequence[Generation],
    nll: Estimate,
    template: Template,
    rate_pmi: Callable[[Sequence[PairText]], list[Rating]],
    passes: Callable[[Generation, Example], bool],
) -> BackwardMeter:
    """Measures M_yx on held-out pairs, of which it has been asked.

    Args:
      generations: one instruction per example that it drew. nll: of the true instructions.
      template: of its prompts.
      rate_pmi: the `pmi` curator under the judge.
      passes: whether the gates let an instruction through that was drawn for an example.
    """
    pairs = [PairText(e.id, g.text, e.response) for e, g in zip(examples, generations, strict=True)]
    lifts = np.array([r.value for r in rate_pmi(pairs)], float)
    return BackwardMeter(
        nll=nll,
        lift=Estimate(float(lifts.mean()), len(lifts), float(lifts.std() / len(lifts) ** 0.5)),
        copy_rate=float(np.mean([copy_rate(p.instruction, p.response) for p in pairs])),
        echo_rate=float(np.mean([echoes(p.instruction, template) for p in pairs])),
        pass_rate=float(np.mean([passes(*p) for p in zip(generations, examples, strict=True)])),
    )


def copy_rate(instruction: str, response: str) -> float:
    """Length of the longest common substring over the instruction's length; 0 for an empty one."""
    if not instruction:
        return 0.0
    longest = 0
    for start in range(len(instruction)):
        while start + longest < len(instruction) and (
            instruction[start : start + longest + 1] in response
        ):
            longest += 1
    return longest / len(instruction)


def echoes(instruction: str, template: Template) -> bool:
    """Whether the instruction repeats `ECHO_WORDS` words in a row of the backward prompt."""
    prompt = _words(template.backward_text.replace("{response}", " "))
    runs = {tuple(prompt[i : i + ECHO_WORDS]) for i in range(len(prompt) - ECHO_WORDS + 1)}
    words = _words(instruction)
    return any(tuple(words[i : i + ECHO_WORDS]) in runs for i in range(len(words) - ECHO_WORDS + 1))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
