"""How much of each source is trained on, and how much it counts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.training.examples import ExampleIndex, ranks
from humpback_jax.training.order import Pool

FORM = "NAME:FIELD=VALUE[:FIELD=VALUE...], with the fields weight, cap, repeat, count"


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of one source in training. A source without a share is one with these defaults.

    Attributes:
      weight: of the source's tokens in the loss; it draws nothing more often. With it, a step
        minimises (sum over sources s of weight_s times the nll of the batch's supervised tokens of
        s) / (sum over s of weight_s times their number). Reported losses carry no weights.
      cap: at most so many examples are used, those that a hash of their identity comes first with:
        the same ones whatever the seed and the order of the input.
      repeat: draws an epoch for each example; with 1.5, an epoch sees half of them twice, and the
        next one the other half.
      count: draws an epoch, instead of `repeat`.
    """

    source: str
    weight: float = 1.0
    cap: int | None = None
    repeat: float = 1.0
    count: int | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "cap", "repeat", "count"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise HumpbackError(
                    f"mixture: {self.source}:{name}={value} must be above 0"
                    + (f"; leave {self.source} out instead." if not value else ".")
                )
        if self.count is not None and self.repeat != 1:
            raise HumpbackError(f"mixture: {self.source} has both repeat and count; give one.")


_TYPES = {"weight": float, "cap": int, "repeat": float, "count": int}


def parse_mixture(texts: Sequence[str]) -> tuple[Share, ...]:
    """`web:weight=0.5:cap=1000` -> Share("web", weight=0.5, cap=1000).

    Raises:
      HumpbackError: another form, a source named twice, or a number that means nothing.
    """
    shares: dict[str, Share] = {}
    for text in texts:
        name, *settings = text.split(":")
        fields: dict[str, Any] = {}
        for setting in settings:
            field, _, value = setting.partition("=")
            try:
                fields[field] = _TYPES[field](value)
            except (KeyError, ValueError) as error:
                raise HumpbackError(
                    f"mixture: {setting!r} in {text!r} is not known; it has the form {FORM}."
                ) from error
        if not name or "=" in name or name in shares:
            why = "is named twice" if name in shares else f"is not of the form {FORM}"
            raise HumpbackError(f"mixture: {text!r} {why}.")
        shares[name] = Share(name, **fields)
    return tuple(shares.values())


def check_sources(mixture: Sequence[Share], names: Sequence[str]) -> None:
    """Raises HumpbackError where a share names a source that there is not."""
    for share in mixture:
        if share.source not in names:
            raise HumpbackError(
                f"mixture: there is no source {share.source!r}; the sources are: "
                f"{', '.join(sorted(names))}."
            )


def shares_of(names: Sequence[str], mixture: Sequence[Share]) -> list[Share]:
    """One share for each of these sources, in their order.

    Shares of other sources do not count: M_0 is trained on the seed alone, under the mixture of all
    rounds. `check_sources` finds wrong names.
    """
    given = {share.source: share for share in mixture}
    return [given.get(name, Share(name)) for name in names]


def pools_of(keys: np.ndarray, sources: np.ndarray, shares: Sequence[Share]) -> list[Pool]:
    """What `BatchOrder` draws from: for each source its chosen examples, and how often.

    Args:
      keys, sources: [n], as in `ExampleIndex`. shares: one for each source.
    """
    pools = []
    for number, share in enumerate(shares):
        members = np.flatnonzero(sources == number)
        if share.cap is not None and share.cap < len(members):
            first = np.argsort(ranks(keys[members], "cap"), kind="stable")[: share.cap]
            members = np.sort(members[first])
        pools.append(Pool(members, share.count or max(round(share.repeat * len(members)), 1)))
    return pools


def loss_weights(shares: Sequence[Share]) -> tuple[float, ...]:
    """The weight of each source; empty where all of them count alike."""
    weights = tuple(share.weight for share in shares)
    return weights if set(weights) != {1.0} else ()


def source_counts(index: ExampleIndex, mixture: Sequence[Share]) -> dict[str, dict[str, Any]]:
    """By source: examples in use, their tokens, draws an epoch, and the weight in the loss."""
    shares = shares_of(index.names, mixture)
    pools = pools_of(index.keys, index.sources, shares)
    return {
        share.source: {
            "examples": len(pool.members),
            "draws": pool.draws,
            "tokens": int(index.lengths[pool.members].sum()),
            "supervised_tokens": int(index.supervised[pool.members].sum()),
            "weight": share.weight,
        }
        for share, pool in zip(shares, pools, strict=True)
    }
