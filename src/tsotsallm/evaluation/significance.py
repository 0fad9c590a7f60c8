"""The uncertainty of a score, and whether two models really differ: every measure is a function of sums over items.

A measure of n items with features x_i (one row each) is g(Σ x_i): accuracy is Σ right / Σ 1, perplexity is
exp(Σ loss / Σ tokens). One jackknife and one paired bootstrap then serve all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Measure:
    """A score: `combine` maps sums of the named per-item features to the value, (..., features) -> (...)."""

    name: str
    features: tuple[str, ...]
    combine: Callable[[Array], Array]
    higher_is_better: bool = True
    share: bool = False                 # a share of items or similar, shown in per cent
    binary: bool = False                # every item is right or wrong

    def of(self, items: Array) -> float:
        """The measure over all items, given as (items, features)."""
        return float(self.combine(items.sum(0)))


def ratio(sums: Array) -> Array:
    """The first sum divided by the second: (..., 2) -> (...)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def standard_error(measure: Measure, items: Array) -> float | None:
    """Jackknife standard error (Efron 1982): √((n−1)/n · Σ(g_(i) − ḡ)²); that of a mean is s/√n exactly.

    None for fewer than two items, or where leaving one out leaves nothing to measure. Where all of n items are right, or
    none is, √(p(1−p)/(n+4)) with p = (k+2)/(n+4) (Agresti and Coull 1998): n equal items do not make certainty.
    """
    count = len(items)
    if count < 2:
        return None
    if measure.binary and (right := items[:, 0].sum()) in (0, count):
        share = (right + 2) / (count + 4)
        return float(np.sqrt(share * (1 - share) / (count + 4)))
    left_out = measure.combine(items.sum(0) - items)
    if not np.isfinite(left_out).all():
        return None
    return float(np.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum()))


@dataclass(frozen=True)
class Difference:
    """second − first on the same items, with its 95% interval; `p` is McNemar's, where items are right or wrong."""

    value: float
    low: float
    high: float
    p: float | None = None

    @property
    def within_noise(self) -> bool:
        """Whether the interval holds zero, or McNemar's test does not separate the models at 5%."""
        return self.low <= 0 <= self.high or (self.p is not None and self.p > 1 - CONFIDENCE)

    def plain(self) -> dict[str, object]:
        """The fields and `within_noise` as plain data for JSON."""
        return finite(self.__dict__ | {"within_noise": self.within_noise})


def paired_difference(measure: Measure, first: Array, second: Array, *, seed: int = 0, resamples: int = RESAMPLES,
                      confidence: float = CONFIDENCE) -> Difference:
    """Paired bootstrap of the difference of a measure (Efron and Tibshirani 1993, ch. 13).

    Both models answer the same items, (items, features) each; items are drawn together. The interval is that of the
    percentile bootstrap, stretched by √(n/(n−1)) about the difference, since resampling n items understates the spread.
    Raises ValueError where the numbers of items differ.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} items against {len(second)}: a paired comparison takes the same items")
    count = len(first)
    value = measure.of(second) - measure.of(first)
    p = mcnemar(first[:, 0] > 0, second[:, 0] > 0) if measure.binary else None
    if count < 2:
        return Difference(value, -math.inf, math.inf, p)
    both = np.concatenate([first, second], axis=1)
    width = first.shape[1]
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    step = max(1, 4_000_000 // max(count, 1))
    for start in range(0, resamples, step):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - start))
        sums = times @ both
        drawn[start:start + step] = measure.combine(sums[:, width:]) - measure.combine(sums[:, :width])
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Difference(value, -math.inf, math.inf, p)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    stretch = math.sqrt(count / (count - 1))
    return Difference(value, float(value + (low - value) * stretch), float(value + (high - value) * stretch), p)


def finite(numbers: Mapping[str, object]) -> dict[str, object]:
    """Numbers as JSON allows them: what is not finite becomes None."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in numbers.items()}


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Two-sided exact p-value of McNemar's test (McNemar 1947) on what two models have right, (items,) each.

    Under the null hypothesis each model has half of the items that exactly one of them has right: a binomial test.
    """
    only_first = int((first & ~second).sum())
    only_second = int((second & ~first).sum())
    return binomial_two_sided(min(only_first, only_second), only_first + only_second)


def binomial_two_sided(fewer: int, total: int) -> float:
    """Probability that `total` fair coins split at least as unevenly as `fewer` against the rest."""
    if total == 0:
        return 1.0
    tail = math.fsum(math.exp(math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
                              - total * math.log(2)) for k in range(fewer + 1))
    return min(1.0, 2 * tail)
