"""Errors and intervals against closed forms, SciPy, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tsotsallm.evaluation.significance import (
    Measure,
    binomial_two_sided,
    mcnemar,
    paired_difference,
    ratio,
    standard_error,
)

ACCURACY = Measure("acc", ("right", "items"), ratio, binary=True)
PERPLEXITY = Measure("perplexity", ("loss", "tokens"), lambda sums: np.exp(ratio(sums)))


Shares = tuple[float, float, float, float]


def answers(rng: np.random.Generator, shares: Shares, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Items that (both, only the first, only the second, neither) have right."""
    drawn = rng.choice(4, size=count, p=shares)
    first, second = np.isin(drawn, (0, 1)), np.isin(drawn, (0, 2))
    ones = np.ones(count)
    return np.stack([first, ones], 1).astype(float), np.stack([second, ones], 1).astype(float)


def test_the_standard_error_of_a_mean_is_the_closed_form() -> None:
    values = np.random.default_rng(0).normal(size=57)
    items = np.stack([values, np.ones(57)], 1)
    assert standard_error(ACCURACY, items) == pytest.approx(stats.sem(values), rel=1e-12)
    assert standard_error(ACCURACY, items[:1]) is None


def test_the_standard_error_of_a_ratio_is_near_the_delta_method() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(50, 500, size=400).astype(float)
    losses = tokens * (2 + 0.3 * rng.normal(size=400))
    found = standard_error(PERPLEXITY, np.stack([losses, tokens], 1))
    mean = losses.sum() / tokens.sum()
    by_hand = math.exp(mean) * math.sqrt(400 / 399 * ((losses - mean * tokens) ** 2).sum()) / tokens.sum()
    assert found == pytest.approx(by_hand, rel=0.02)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (3, 3), (1, 9), (40, 60), (0, 7), (600, 700)])
def test_mcnemar_equals_the_binomial_test_of_scipy(only_first: int, only_second: int) -> None:
    first = np.array([True] * only_first + [False] * only_second + [True] * 5)
    second = np.array([False] * only_first + [True] * only_second + [True] * 5)
    total = only_first + only_second
    expected = stats.binomtest(only_first, total, 0.5).pvalue if total else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert binomial_two_sided(min(only_first, only_second), total) == mcnemar(second, first)


def test_the_interval_is_near_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(2)
    first = rng.normal(1.0, 1.0, size=300)
    second = first + rng.normal(0.2, 0.5, size=300)
    ones = np.ones(300)
    found = paired_difference(ACCURACY, np.stack([first, ones], 1), np.stack([second, ones], 1), resamples=8000)
    expected = stats.bootstrap((first, second), lambda a, b, axis: (b - a).mean(axis=axis), paired=True, vectorized=True,
                               n_resamples=8000, method="percentile", random_state=1).confidence_interval
    assert found.value == pytest.approx((second - first).mean())
    assert found.low == pytest.approx(expected.low, abs=0.006)
    assert found.high == pytest.approx(expected.high, abs=0.006)


def test_equal_models_do_not_differ_and_clear_winners_do() -> None:
    rng = np.random.default_rng(3)
    first, _ = answers(rng, (0.5, 0.2, 0.2, 0.1), 300)
    same = paired_difference(ACCURACY, first, first)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert same.within_noise
    worse, better = answers(rng, (0.4, 0.05, 0.3, 0.25), 300)
    assert not paired_difference(ACCURACY, worse, better).within_noise
    with pytest.raises(ValueError, match="same items"):
        paired_difference(ACCURACY, worse, better[1:])


def test_few_items_make_no_significance() -> None:
    wrong, right = np.array([[0.0, 1.0]]), np.array([[1.0, 1.0]])
    one = paired_difference(ACCURACY, wrong, right)
    assert (one.low, one.high, one.within_noise) == (-math.inf, math.inf, True)
    assert one.plain()["low"] is None
    four = paired_difference(ACCURACY, np.repeat(wrong, 4, 0), np.repeat(right, 4, 0))
    assert four.p == pytest.approx(0.125)
    assert four.within_noise
    none_right = standard_error(ACCURACY, np.repeat(wrong, 60, 0))
    assert none_right == pytest.approx(math.sqrt(2 / 64 * 62 / 64 / 64))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "shares"), [(200, (0.5, 0.15, 0.15, 0.2)), (200, (0.6, 0.12, 0.04, 0.24)),
                                               (500, (0.3, 0.05, 0.1, 0.55))])
def test_intervals_hold_the_truth_as_often_as_they_say(count: int, shares: tuple[float, float, float, float]) -> None:
    rng = np.random.default_rng(4)
    truth = shares[2] - shares[1]
    held = 0
    simulations = 2000
    for number in range(simulations):
        found = paired_difference(ACCURACY, *answers(rng, shares, count), seed=number, resamples=400)
        held += found.low - 1e-12 <= truth <= found.high + 1e-12
    assert 0.93 <= held / simulations <= 0.97
