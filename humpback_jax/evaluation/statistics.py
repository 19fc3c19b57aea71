"""Estimates with their uncertainty: ratios of sums, paired differences, rank statistics."""

from __future__ import annotations

import dataclasses

import numpy as np

RESAMPLES = 10_000


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
      nll: [n] nats a example; tokens: [n].
    """
    samples = _resample(len(nll), seed)
    ratios = nll[samples].sum(axis=1) / tokens[samples].sum(axis=1)
    return Estimate(float(nll.sum() / tokens.sum()), len(nll), float(ratios.std()))


def paired_difference(
    nll: np.ndarray, reference: np.ndarray, tokens: np.ndarray, seed: int = 0
) -> Estimate:
    """Difference of two models' NLL a token on the same examples: paired bootstrap, 95 %."""
    samples = _resample(len(nll), seed)
    differences = (nll - reference)[samples].sum(axis=1) / tokens[samples].sum(axis=1)
    low, high = np.quantile(differences, [0.025, 0.975])
    value = float((nll - reference).sum() / tokens.sum())
    return Estimate(value, len(nll), float(differences.std()), float(low), float(high))


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting one half."""
    difference = np.asarray(positive)[:, None] - np.asarray(negative)[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def _resample(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
