"""Dominance and hypervolume against closed forms and Optuna's own."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from tsotsallm.study.pareto import dominates, front, hypervolume


def test_dominance() -> None:
    assert dominates((1, 2), (1, 3))
    assert not dominates((1, 2), (1, 2))
    assert not dominates((1, 3), (2, 2))
    assert front([(1, 4), (2, 2), (3, 3), (4, 1), (2, 2)]) == [0, 1, 3, 4]


def test_volumes_with_a_closed_form() -> None:
    assert hypervolume([(0.25,)], (1.0,)) == 0.75
    assert hypervolume([(0, 0.5), (0.5, 0)], (1, 1)) == pytest.approx(0.75)
    assert hypervolume([(0.2, 0.2, 0.2)], (1, 1, 1)) == pytest.approx(0.8 ** 3)
    assert hypervolume([(0, 0, 0.5), (0, 0.5, 0), (0.5, 0, 0)], (1, 1, 1)) == pytest.approx(7 / 8)
    assert hypervolume([(2, 2)], (1, 1)) == 0
    assert hypervolume([], (1, 1)) == 0
    # points on a quarter of a circle: the staircase between 1/n and its limit 1 - pi/4
    points = [(1 - math.cos(angle), 1 - math.sin(angle)) for angle in np.linspace(0, math.pi / 2, 2001)]
    assert hypervolume(points, (1, 1)) == pytest.approx(math.pi / 4, abs=1e-3)


@pytest.mark.parametrize("measures", [2, 3])
def test_volumes_and_fronts_are_those_of_optuna(measures: int) -> None:
    optuna = pytest.importorskip("optuna", reason="optuna is in the extra [study]")
    from optuna._hypervolume import compute_hypervolume
    from optuna.study._multi_objective import _is_pareto_front

    assert optuna
    rng = random.Random(measures)
    for _ in range(30):
        points = [tuple(rng.random() for _ in range(measures)) for _ in range(rng.randint(1, 25))]
        reference = (1.0,) * measures
        assert hypervolume(points, reference) == pytest.approx(
            compute_hypervolume(np.array(points), np.array(reference)), rel=1e-9)
        on_front = _is_pareto_front(np.array(points), assume_unique_lexsorted=False)
        assert front(points) == [place for place, best in enumerate(on_front) if best]
