"""Masks and grids against naive loops."""

from __future__ import annotations

import pytest
import torch

from tsotsallm.errors import RecipeError
from tsotsallm.numerics.grids import NARROWER, IntegerGrid, NormalFloatGrid, Quantised, grid_from
from tsotsallm.numerics.masks import keep_all_but, keep_fraction, wanda_saliency


def naive_mask(saliency: torch.Tensor, prune: int, group: int) -> torch.Tensor:
    keep = torch.ones_like(saliency, dtype=torch.bool)
    for row in range(saliency.shape[0]):
        for start in range(0, saliency.shape[1], group):
            ranked = sorted(range(start, start + group), key=lambda column: (saliency[row, column].item(), column))
            keep[row, ranked[:prune]] = False
    return keep


@pytest.mark.parametrize(("prune", "group"), [(1, 8), (2, 4), (0, 4), (3, 4), (5, 16), (10, 32)])
def test_masks_prune_the_least_salient_of_every_group_and_the_lower_of_equals(prune: int, group: int) -> None:
    generator = torch.Generator().manual_seed(prune)
    weight = torch.randint(-3, 4, (12, 64), generator=generator).float()     # many ties
    norms = torch.randint(1, 3, (64,), generator=generator).float()
    saliency = wanda_saliency(weight, norms)
    assert torch.equal(keep_all_but(saliency, prune, group), naive_mask(saliency, prune, group))


def test_a_fraction_is_pruned_row_by_row() -> None:
    saliency = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).abs()
    keep = keep_fraction(saliency, 0.33)
    assert (~keep).sum(1).tolist() == [13] * 6
    assert all(saliency[row][~keep[row]].max() <= saliency[row][keep[row]].min() for row in range(6))


def test_a_group_that_does_not_divide_names_the_usable_ones() -> None:
    with pytest.raises(RecipeError, match=r"has 172.*usable groups: 2, 4, 43, 86, 172"):
        keep_all_but(torch.ones(2, 172), 2, 8)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_is_to_the_nearest_value_of_the_grid(bits: int, symmetric: bool) -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(bits))
    rounded = IntegerGrid(bits, 16, symmetric).round(weight, torch.float32)
    values = rounded.dequantise()
    for row in range(5):
        for column in range(32):
            scale = rounded.scales[row, column // 16].item()
            zero = rounded.zero_points[row, column // 16].item() if rounded.zero_points is not None else 0
            grid = [(code - zero) * scale for code in range(-(1 << (bits - 1)), 1 << (bits - 1))]
            nearest = min(abs(weight[row, column].item() - value) for value in grid)
            assert abs(weight[row, column].item() - values[row, column].item()) == pytest.approx(nearest, abs=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_exactly_zero(symmetric: bool) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) + 2
    keep = keep_all_but(weight.abs(), 2, 4)
    assert bool((IntegerGrid(2, 32, symmetric).round(weight, torch.bfloat16, keep).dequantise()[~keep] == 0).all())


def test_a_group_of_zeros_can_be_stored() -> None:
    rounded = IntegerGrid(4, 8).round(torch.zeros(2, 16), torch.float16)
    assert bool((rounded.dequantise() == 0).all())
    assert bool((rounded.scales == 1).all())


def test_normal_float_levels_are_those_of_the_paper_and_rounding_finds_the_nearest() -> None:
    published = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                 -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    grid = NormalFloatGrid(4, 32)
    levels = grid.levels(torch.arange(-8, 8, dtype=torch.int8))
    torch.testing.assert_close(levels, torch.tensor(published), rtol=0, atol=2e-6)
    weight = torch.randn(12, 96)
    keep = torch.rand(12, 96) > 0.3
    stored = grid.round(weight, torch.float32, keep)
    values = stored.dequantise()
    for row in range(12):
        for column in range(96):
            first = column // 32 * 32
            scale = (weight[row, first:first + 32] * keep[row, first:first + 32]).abs().max()
            wanted = weight[row, column] * keep[row, column]
            nearest = min((level * scale for level in levels), key=lambda level: abs(level - wanted))
            assert abs(values[row, column] - wanted) <= abs(nearest - wanted) + 1e-6
    assert (values[~keep] == 0).all()
    assert grid_from(grid.plain()) == grid


@pytest.mark.parametrize("grid", [IntegerGrid(4, 8), IntegerGrid(2, 8), IntegerGrid(3, None), NormalFloatGrid(4, 8),
                                  IntegerGrid(3, 8, symmetric=False)], ids=["int4", "int2", "rows", "nf4", "asymmetric"])
def test_searched_scales_leave_the_least_error_of_all_that_are_tried(grid: IntegerGrid) -> None:
    """Against a loop over the shares of every group's range by itself."""
    generator = torch.Generator().manual_seed(2)
    weight, importance = torch.randn(5, 24, generator=generator) ** 3, torch.rand(24, generator=generator)
    weight[1, :8] = 0
    found = grid.searched(weight, torch.float32, importance)
    width = grid.group or 24
    for row in range(5):
        for first in range(0, 24, width):
            part, weights = weight[row:row + 1, first:first + width], importance[first:first + width]

            def error(scales: torch.Tensor, points: torch.Tensor | None, part: torch.Tensor = part,
                      weights: torch.Tensor = weights) -> float:
                alone = Quantised(grid.encode(part, scales, points), scales, points, grid)
                return float(((alone.dequantise() - part).square() * weights).sum())

            tried = []
            for share in (1.0, *NARROWER):
                scales, points = grid.fit(part * share, torch.float32)
                tried.append(error(scales, points))
            group = first // width
            points = None if found[1] is None else found[1][row:row + 1, group:group + 1]
            assert error(found[0][row:row + 1, group:group + 1], points) == pytest.approx(min(tried), rel=1e-5, abs=1e-9)
    whole, _ = grid.fit(weight, torch.float32)
    assert (found[0] <= whole * (1 + 1e-6)).all()
    assert (found[0] < whole).any()
