"""Ratings of (instruction, response) pairs by a model: five curators, one row form.

`rubric` is the paper's reasoned rating (section 2.3); the likelihood curators read the same model
without generating. All see the pair without source tags.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.evaluation.statistics import mid_ranks
from humpback_jax.inference import Generation, Inference, holds
from humpback_jax.models import LanguageModel
from humpback_jax.sampling.sampler import Decoding, record_key
from humpback_jax.streaming import Asked, draw_shards
from humpback_jax.text.rubric import SCORES, parse_score, score_token_ids
from humpback_jax.text.template import Template


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a curator's values are, and the numbers between which they lie.

    Attributes:
      reached: whether `most` is a value, or only what all values stay below.
    """

    text: str
    least: float
    most: float
    reached: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value lies on the scale."""
        return self.least <= value < self.most or (self.reached and value == self.most)


# No bound follows from the definition of pmi, but at 5 the instruction would make the tokens 148
# times as probable on average: it does where it holds them, and such copies do not pass the gates.
_NATS = Scale("nats a token that the instruction saves, between -5 and 5", -5.0, 5.0)
SCALES = {
    "rubric": Scale("scores from 1 to 5", 1.0, 5.0, reached=True),
    "rubric_likelihood": Scale("expected scores from 1 to below 5", 1.0, 5.0),
    "pmi": _NATS,
    "pmi_frozen": _NATS,
    "combined": Scale("mean percentiles from 0 to below 1", 0.0, 1.0),
}
CURATORS = tuple(SCALES)
COMBINED = ("pmi", "rubric_likelihood")  # the parts of `combined`


@dataclasses.dataclass(frozen=True)
class PairText:
    """What a curator sees, and the id that its rating carries."""

    id: str
    instruction: str
    response: str


@dataclasses.dataclass(frozen=True)
class Rating:
    """A curator's verdict; `value` is None when it gave none (an unparsable rating)."""

    id: str
    curator: str
    value: float | None
    detail: str


@dataclasses.dataclass
class Scored:
    """What one judge has computed so far, so that no curator computes it again.

    Attributes:
      alone: log p(y) of each response y, by `_digest`.
      ratings: by curator and pair.
    """

    alone: dict[bytes, float] = dataclasses.field(default_factory=dict)
    ratings: dict[tuple[str, PairText], Rating] = dataclasses.field(default_factory=dict)


def check_curator(name: str, rounds: int) -> None:
    """Raises HumpbackError for an unknown curator, or one that cannot drive the loop."""
    if name not in CURATORS:
        raise HumpbackError(f"curator {name!r} is unknown; choose from {', '.join(CURATORS)}.")
    if name == "pmi_frozen" and rounds > 1:
        raise HumpbackError(
            "curate.curator='pmi_frozen' scores under the base model, so every round would select "
            "the same pairs. Use it with rounds=1 or in curate.also; for the loop use 'pmi'."
        )


def rate(
    curator: str,
    judge: Inference,
    pairs: Sequence[PairText],
    decoding: Decoding,
    seed: int,
    scored: Scored,
) -> list[Rating]:
    """Rates pairs, in order.

    Args:
      judge: M_{t-1}; the base model for `pmi_frozen`.
      decoding: of the reasoned rubric.
      scored: of this judge, with this decoding and seed; filled here.
    """
    if curator == "combined":
        return combine(
            {part: rate(part, judge, pairs, decoding, seed, scored) for part in COMBINED}
        )
    new = [pair for pair in pairs if (curator, pair) not in scored.ratings]
    if new:
        match curator:
            case "rubric":
                ((_, rated),) = _rubric(judge, [(0, new)], decoding, seed)
                ratings = [rating for _, rating in rated]
            case "rubric_likelihood":
                ratings = _rubric_likelihood(judge, new)
            case "pmi" | "pmi_frozen":
                ratings = _pmi(curator, judge, new, scored.alone)
            case unknown:
                raise AssertionError(unknown)
        scored.ratings.update({(curator, p): r for p, r in zip(new, ratings, strict=True)})
    return [scored.ratings[curator, pair] for pair in pairs]


def rate_shards(
    curator: str,
    judge: Inference,
    shards: Iterable[tuple[int, Sequence[PairText]]],
    decoding: Decoding,
    seed: int,
    rated: Callable[[int], None] = lambda pairs: None,
) -> Iterator[tuple[int, list[tuple[PairText, Rating]]]]:
    """(number of a shard, its pairs in order, each with its rating), in any order of shards.

    Of the shards that are done, only the number log p(y) of each response stays in memory.

    Args:
      shards: (number, pairs), read as they are needed.
      rated: told how many more pairs are rated.
    """
    if curator == "rubric":
        yield from _rubric(judge, shards, decoding, seed, rated)
        return
    alone: dict[bytes, float] = {}
    for number, pairs in shards:
        ratings = rate(curator, judge, pairs, decoding, seed, Scored(alone))
        rated(len(pairs))
        yield number, list(zip(pairs, ratings, strict=True))


def _rubric(
    judge: Inference,
    shards: Iterable[tuple[int, Sequence[PairText]]],
    decoding: Decoding,
    seed: int,
    rated: Callable[[int], None] = lambda pairs: None,
) -> Iterator[tuple[int, list[tuple[PairText, Rating]]]]:
    template = judge.model.template

    def ask(pair: PairText) -> Asked:
        prompt = template.rubric_prompt(pair.instruction, pair.response)
        return pair.id, prompt, record_key(seed, "rubric", pair.id, 0), decoding

    for number, drawn in draw_shards(
        judge, shards, ask, lambda text: template.rubric_prompt(text, ""), lambda: rated(1)
    ):
        yield number, [(pair, _reasoned(pair, generation)) for pair, generation in drawn]


def _reasoned(pair: PairText, drawn: Generation) -> Rating:
    score = parse_score(drawn.text) if drawn.finish_reason == "stop" else None
    value = None if score is None else float(score)
    detail = {"text": drawn.text, "finish_reason": drawn.finish_reason}
    return Rating(pair.id, "rubric", value, json.dumps(detail))


def _rubric_likelihood(judge: Inference, pairs: Sequence[PairText]) -> list[Rating]:
    """Expected score over the five score tokens, divided by their share for an empty pair.

    Small models favour one digit whatever they read; the empty pair shows which (calibration by a
    content-free input, Zhao et al., 2021).
    """
    template = judge.model.template
    groups = score_token_ids(judge.model.tokenizer)
    ids = [token for group in groups for token in group]
    prompts = [("the empty pair", template.rubric_likelihood_prompt("", ""))]
    prompts += [(p.id, template.rubric_likelihood_prompt(p.instruction, p.response)) for p in pairs]
    log_probs = judge.next_token_log_probs(
        prompts, ids, lambda text: template.rubric_likelihood_prompt(text, "")
    )
    starts = np.cumsum([0, *(len(group) for group in groups[:-1])])
    scores = np.logaddexp.reduceat(log_probs, starts, axis=1)
    ratings = []
    for pair, log_mass in zip(pairs, scores[1:], strict=True):
        share, calibrated = _softmax(log_mass), _softmax(log_mass - scores[0])
        detail = {
            "distribution": [round(float(x), 6) for x in share],
            "calibrated": [round(float(x), 6) for x in calibrated],
            "outside": round(float(1 - np.exp(log_mass).sum()), 6),
            "raw": round(float(share @ np.array(SCORES)), 6),
        }
        value = round(float(calibrated @ np.array(SCORES)), 6)
        ratings.append(Rating(pair.id, "rubric_likelihood", value, json.dumps(detail)))
    return ratings


def _softmax(log_weights: np.ndarray) -> np.ndarray:
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def _pmi(
    curator: str,
    judge: Inference,
    pairs: Sequence[PairText],
    alone: dict[bytes, float],
) -> list[Rating]:
    """(log p(y | x) - log p(y)) / |y|, in nats a token; log p(y) once per response."""
    template = judge.model.template
    names = [_digest(pair.response) for pair in pairs]
    new = {name: pair for name, pair in zip(names, pairs, strict=True) if name not in alone}
    if new:
        nll, _ = judge.nll(
            [(pair.id, template.response_alone(pair.response)) for pair in new.values()],
            lambda text: template.response_alone(text).text,
        )
        alone.update(zip(new, (-nll).tolist(), strict=True))
    joint = [(p.id, template.forward(_chat(p))) for p in pairs]
    nll, tokens = judge.nll(joint, template.question)
    ratings = []
    for pair, name, value, count in zip(pairs, names, nll, tokens, strict=True):
        given, prior = -float(value), alone[name]
        detail = {
            "log_p_y_given_x": round(given, 4),
            "log_p_y": round(prior, 4),
            "tokens": int(count),
        }
        score = round((given - prior) / int(count), 6)
        ratings.append(Rating(pair.id, curator, score, json.dumps(detail)))
    return ratings


def _digest(response: str) -> bytes:
    return hashlib.blake2b(response.encode(), digest_size=16).digest()


def require_rateable(model: LanguageModel, curator: str, pair: PairText) -> None:
    """Checks that the window of a model holds all texts that `rate` makes of a pair.

    Raises:
      HumpbackError: it does not, or the model's chat template refuses the pair.
    """
    written = int(curator == "rubric")  # one token at least; the others only read
    for text in _texts(curator, model.template, pair):
        if not holds(model, text, written):
            raise HumpbackError(
                f"{len(model.tokenizer.encode(text)) + written} tokens, the model's window holds "
                f"{model.config.max_position_embeddings}."
            )


def _texts(curator: str, template: Template, pair: PairText) -> list[str]:
    x, y = pair.instruction, pair.response
    match curator:
        case "rubric":
            return [template.rubric_prompt(x, y)]
        case "rubric_likelihood":
            return [template.rubric_likelihood_prompt(x, y)]
        case "combined":
            return [text for part in COMBINED for text in _texts(part, template, pair)]
    return [template.forward(_chat(pair)).text, template.response_alone(y).text]


def _chat(pair: PairText) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": pair.instruction},
        {"role": "assistant", "content": pair.response},
    ]


def combine(parts: Mapping[str, Sequence[Rating]]) -> list[Rating]:
    """Ratings of `combined`: the mean percentile, among these pairs, of their ratings by each part.

    A pair that a part gave no number gets none here, and no place among the others.

    Args:
      parts: the ratings of the same pairs, in the same order, by each of `COMBINED`.
    """
    values = np.array([[r.value for r in ratings] for ratings in parts.values()], float)
    known = ~np.isnan(values).any(axis=0)
    # A percentile is the share of values below, and half of the equal ones, its own among them.
    percentiles = [(mid_ranks(row) - 0.5) / len(row) for row in values[:, known]]
    means = np.full(len(known), np.nan)
    means[known] = np.mean(percentiles, axis=0)
    combined = []
    for mean, *ratings in zip(means.tolist(), *parts.values(), strict=True):
        detail = dict(zip(parts, (rating.value for rating in ratings), strict=True))
        value = None if math.isnan(mean) else round(mean, 6)
        combined.append(Rating(ratings[0].id, "combined", value, json.dumps(detail)))
    return combined
