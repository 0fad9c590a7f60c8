"""Plans against trying every combination; what corrections and their uncertainty are."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.fit.parts import files, units
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.fit.files import Structure
from tsotsallm.fit.plans import UNSURE, Choices, Corrections, Limits, Plan, corrected, plan_for, structures, unsure
from tsotsallm.stages.allocation import candidates


def test_a_plan_is_as_good_as_trying_every_combination(model: Path) -> None:
    """Three matrices may choose, all others have one grid: the best of all combinations within the budget is found."""
    made = files(model)
    spec = made.whole
    measured = units(spec)
    free = ["0.mlp.down_proj", "1.self_attn.o_proj", "model.embed_tokens"]
    for key, known in measured.grids.items():
        if key not in free:
            measured.grids[key] = dict.fromkeys(known, 0.0)
    shapes = {"0.mlp.down_proj": linear_shapes(spec, 0)["mlp.down_proj"],
              "1.self_attn.o_proj": linear_shapes(spec, 1)["self_attn.o_proj"],
              "model.embed_tokens": (spec.vocabulary, spec.hidden)}
    choices = Choices.of(Structure(), made, measured)
    least = choices.smallest
    options_of = [[(grid.stored_bytes(*shapes[key]), measured.grids[key][grid.type]) for grid in candidates(shapes[key][1])]
                  for key in free]
    smaller = sum(min(size for size, _ in options) for options in options_of)
    for budget in range(least, least + 6000, 1500):
        plan = plan_for(choices, measured, Corrections(), Limits(budget))
        assert plan is not None
        assert made.layout(Structure(), plan.grids).total_bytes <= plan.bytes <= budget
        best = min(sum(loss for _, loss in combination) for combination in itertools.product(*options_of)
                   if sum(size for size, _ in combination) - smaller <= budget - least)
        largest_step = max(abs(a[1] - b[1]) for options in options_of for a, b in itertools.pairwise(options))
        assert best - 1e-12 <= plan.grids_loss <= best + largest_step
    assert plan_for(choices, measured, Corrections(), Limits(least - 1)) is None


def test_smaller_structures_take_over_when_bytes_run_out(model: Path) -> None:
    made = files(model)
    spec = made.whole
    measured = units(spec)
    every = [Choices.of(structure, made, measured) for structure in structures(measured)]
    smallest = min(every, key=lambda one: one.smallest)
    assert smallest.structure == Structure((0, 1), 0.25)

    def best(more: int) -> Plan:
        plans = [plan_for(one, measured, Corrections(), Limits(smallest.smallest + more)) for one in every]
        return min((plan for plan in plans if plan is not None), key=lambda plan: plan.loss)

    plans = [best(more) for more in (0, 20_000, 150_000)]
    assert plans[0].structure == smallest.structure
    assert [plan.loss for plan in plans] == sorted((plan.loss for plan in plans), reverse=True)
    assert plans[2].structure == Structure()


def test_a_limit_of_seconds_is_kept_at_the_least_loss(model: Path) -> None:
    """Against trying every combination of three matrices' grids."""
    made = files(model)
    spec = made.whole
    torch.manual_seed(3)
    measured = units(spec)
    measured.seconds.update({"q2_k": 3e-9, "q3_k": 3e-9, "q4_0": 1e-9, "q4_1": 1.2e-9, "q5_0": 2e-9, "q5_1": 2.2e-9,
                             "q8_0": 1.5e-9, "iq4_nl": 1.1e-9})
    choices = Choices.of(Structure(), made, measured)
    some = list(choices.sizes)[:3]
    few = replace(choices, fixed=0, sizes={key: choices.sizes[key] for key in some},
                  losses={key: choices.losses[key] for key in some}, seconds={key: choices.seconds[key] for key in some})
    budget = 3 * max(few.sizes[some[0]])
    every = list(itertools.product(*(range(len(few.sizes[key])) for key in some)))
    times = sorted(few.total(few.seconds, dict(zip(some, places, strict=True))) for places in every)
    slack = max(abs(a - b) for key in some for a, b in itertools.pairwise(few.losses[key]))
    for limit in (times[len(times) // 8], times[len(times) // 2]):
        chosen = few.best(Limits(budget, limit))
        assert chosen is not None
        assert few.total(few.seconds, chosen) <= limit
        assert few.total(few.sizes, chosen) <= budget
        found = [few.total(few.losses, one) for one in (dict(zip(some, places, strict=True)) for places in every)
                 if few.total(few.seconds, one) <= limit and few.total(few.sizes, one) <= budget]
        assert few.total(few.losses, chosen) <= min(found) + slack
    assert few.best(Limits(budget, times[0] / 2)) is None


def test_corrections_are_mean_ratios_by_the_logarithm() -> None:
    assert corrected([]) == 1.0
    assert corrected([(1.0, 2.0), (1.0, 8.0)]) == pytest.approx(4.0)
    assert corrected([(0.0, 1.0)]) == 1.0


def test_the_next_prediction_is_as_unsure_as_the_spread_of_those_before() -> None:
    """What all were off by alike is corrected, and says nothing."""
    assert unsure([]) == unsure([(1.0, 1.01)]) == UNSURE
    assert unsure([(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]) == pytest.approx(0.0, abs=1e-12)
    assert unsure([(1.0, math.exp(0.1)), (1.0, math.exp(0.3)), (1.0, math.exp(0.2))]) == pytest.approx(
        0.1 * math.sqrt(1 + 1 / 3))
    assert unsure([(1.0, 1.0), (1.0, 9.0)]) == UNSURE
    assert unsure([(0.0, 1.0), (1.0, 0.0), (1.0, 1.1)]) == UNSURE           # two of these say nothing
