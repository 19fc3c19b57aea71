"""Estimates with their uncertainty: ratios of sums, paired differences, rank statistics."""

from __future__ import annotations

import dataclasses

import numpy as np

RESAMPLES = 10_000
CHUNK = 500  # resamples drawn together: bounds the memory


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its sample size, standard error and, where asked for, 95 % interval."""

    value: float
    n: int
    stderr: float
    low: float | None = None
    high: float | None = None

    def record(self) -> dict[str, float | int | None]:
        return dataclasses.asdict(self)


def token_mean(nll: np.ndarray, tokens: np.ndarray, seed: int = 0) -> Estimate:
    """Sum of nll over sum of tokens, with a bootstrap over examples.

    Args:
      nll: [n] nats an example; tokens: [n].
    """
    ratios = _resampled_ratios(nll, tokens, seed)
    return Estimate(float(nll.sum() / tokens.sum()), len(nll), float(ratios.std()))


def paired_difference(
    nll: np.ndarray, reference: np.ndarray, tokens: np.ndarray, seed: int = 0
) -> Estimate:
    """Difference of two models' NLL a token on the same examples: paired bootstrap, 95 %."""
    differences = _resampled_ratios(nll - reference, tokens, seed)
    low, high = np.quantile(differences, [0.025, 0.975])
    value = float((nll - reference).sum() / tokens.sum())
    return Estimate(value, len(nll), float(differences.std()), float(low), float(high))


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting one half.

    From the positives' ranks among all (Mann and Whitney, 1947), so that n scores take n log n.
    """
    ranks = mid_ranks(np.concatenate([positive, negative]))[: len(positive)]
    above = ranks.sum() - len(positive) * (len(positive) + 1) / 2
    return float(above / (len(positive) * len(negative)))


def mid_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 for the least of n values [n] to n; equal ones share the mean of theirs."""
    _, inverse, sizes = np.unique(values, return_inverse=True, return_counts=True)
    middle: np.ndarray = np.cumsum(sizes) - (sizes - 1) / 2
    return middle[inverse]


def _resampled_ratios(values: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray:
    """Sum of values over sum of weights [RESAMPLES], examples drawn with replacement."""
    generator, ratios = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // CHUNK):
        drawn = generator.integers(0, len(values), (CHUNK, len(values)))
        ratios.append(values[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    return np.concatenate(ratios)
