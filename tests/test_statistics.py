"""Intervals and rank statistics: if these fail, a difference is called real that is not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from humpback_jax.evaluation import statistics
from humpback_jax.evaluation.statistics import auc, mid_ranks, paired_difference, token_mean


def example_set(count: int, shift: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """nll of two models on the same examples, of equal length, and the token counts."""
    generator = np.random.default_rng(seed)
    tokens = np.full(count, 50)
    reference = generator.gamma(4.0, 25.0, count)  # examples differ far more than models do
    return reference + 50 * generator.normal(shift, 0.2, count), reference, tokens


def test_the_interval_of_a_paired_difference_is_the_analytic_one():
    nll, reference, tokens = example_set(200, -0.1, 0)
    found = paired_difference(nll, reference, tokens)
    per_example = (nll - reference) / 50
    error = per_example.std() / 200**0.5
    assert found.value == pytest.approx(per_example.mean()) and found.n == 200
    assert found.stderr == pytest.approx(error, rel=0.05)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.15 * error)


def test_pairing_removes_what_the_examples_have_in_common():
    nll, reference, tokens = example_set(100, -0.1, 1)
    paired = paired_difference(nll, reference, tokens)
    assert paired.high < 0
    assert paired.stderr < 0.2 * token_mean(nll, tokens).stderr


def test_the_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    covered = 0
    for seed in range(200):
        found = paired_difference(*example_set(60, -0.05, seed))
        covered += found.low <= -0.05 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_a_mean_is_over_tokens_not_over_examples():
    found = token_mean(np.array([10.0, 1000.0]), np.array([10, 100]))
    assert found.value == pytest.approx(1010 / 110) and found.n == 2
    lengths = np.array([10, 1000] * 50)
    uneven = token_mean(lengths * np.array([5.0, 1.0] * 50), lengths)
    assert uneven.value == pytest.approx((5 * 10 + 1000) / 1010)


def test_figures_are_the_same_every_time_and_for_one_example():
    nll, reference, tokens = example_set(30, 0.0, 3)
    assert paired_difference(nll, reference, tokens) == paired_difference(nll, reference, tokens)
    single = paired_difference(nll[:1], reference[:1], tokens[:1])
    assert single.low == pytest.approx(single.value) == pytest.approx(single.high)
    assert paired_difference(nll, nll, tokens).record()["value"] == 0


def test_thousands_of_examples_need_little_memory():
    import tracemalloc

    count = 5_000
    tracemalloc.start()
    token_mean(np.ones(count), np.ones(count, np.int64), seed=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=20),
    st.lists(st.integers(0, 5), min_size=1, max_size=20),
)
def test_auc_is_the_share_of_pairs_in_order(positive, negative):
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert auc(np.array(positive), np.array(negative)) == pytest.approx(
        wins / (len(positive) * len(negative))
    )
    assert auc(np.array(positive), np.array(negative)) == pytest.approx(
        1 - auc(np.array(negative), np.array(positive))
    )


TIED = st.sampled_from([-np.inf, -2.0, -1e-9, 0.0, 1e-9, 0.5, 3.0])


@given(st.lists(TIED | st.floats(allow_nan=False), max_size=30))
def test_mid_ranks_are_those_of_the_definition_ties_included(values):
    array = np.array(values, float)
    below = (array[:, None] > array[None, :]).sum(axis=1)
    equal = (array[:, None] == array[None, :]).sum(axis=1)
    assert mid_ranks(array).tolist() == (below + (equal + 1) / 2).tolist()
