"""GPTQ and SparseGPT against the published column-by-column algorithms with the inverse Gram, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsotsallm.errors import NumericsError
from tsotsallm.numerics.gptq import gptq, reversed_factor, sparsegpt, visiting_order
from tsotsallm.numerics.grids import IntegerGrid
from tsotsallm.numerics.masks import keep_all_but


def damped(gram: Tensor, damp: float) -> Tensor:
    return gram + damp * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def naive_gptq(weight: Tensor, gram: Tensor, grid: IntegerGrid, damp: float, order: Tensor, keep: Tensor | None) -> Tensor:
    """arXiv:2210.17323, algorithm 1, without blocks: the inverse's upper Cholesky factor, one column at a time."""
    scales, zero_points = grid.fit(weight if keep is None else weight * keep, weight.dtype)
    left = weight[:, order].clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(gram, damp)[order][:, order]), upper=True)
    codes = torch.zeros_like(weight)
    width = grid.group or weight.shape[1]
    for place, column in enumerate(order.tolist()):
        scale = scales[:, column // width]
        zero = zero_points[:, column // width].to(weight.dtype) if zero_points is not None else torch.zeros_like(scale)
        code = (left[:, place] / scale + zero).round().clamp(grid.lowest, grid.highest)
        if keep is not None:
            code = torch.where(keep[:, column], code, zero)
        error = (left[:, place] - (code - zero) * scale) / upper[place, place]
        left[:, place:] -= error[:, None] * upper[place, place:]
        codes[:, column] = code
    return codes


def problem(d_out: int = 48, d_in: int = 192, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(800, d_in, generator=generator, dtype=torch.float64)
    inputs = inputs + 0.5 * inputs @ torch.randn(d_in, d_in, generator=generator, dtype=torch.float64) / d_in ** 0.5
    inputs *= torch.rand(d_in, generator=generator, dtype=torch.float64) + 0.2
    return torch.randn(d_out, d_in, generator=generator, dtype=torch.float64), inputs.mT @ inputs


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [None, 64, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("pruned", [False, True])
def test_gptq_is_the_published_algorithm(act_order: bool, group: int | None, symmetric: bool, pruned: bool) -> None:
    weight, gram = problem()
    keep = keep_all_but(weight.abs(), 2, 4) if pruned else None
    grid = IntegerGrid(3, group, symmetric)
    order = visiting_order(gram.diagonal(), act_order)
    expected = naive_gptq(weight, gram, grid, 0.01, order, keep)
    found = gptq(weight, reversed_factor(gram, order, 0.01), order, grid, torch.float64, keep)
    assert torch.equal(found.codes.double(), expected)
    single = gptq(weight.float(), reversed_factor(gram.float(), order, 0.01), order, grid, torch.float32,
                  keep)
    assert (single.codes == found.codes).double().mean() >= 0.999
    if keep is not None:
        assert bool((found.dequantise()[~keep] == 0).all())


@pytest.mark.parametrize("bits", range(2, 9))
def test_gptq_leaves_less_output_error_than_rounding(bits: int) -> None:
    weight, gram = problem(seed=bits)
    grid = IntegerGrid(bits, 64)
    order = visiting_order(gram.diagonal(), True)

    def error(values: Tensor) -> float:
        difference = values.double() - weight
        return float((difference @ gram * difference).sum())

    found = gptq(weight, reversed_factor(gram, order, 0.01), order, grid, torch.float64)
    assert error(found.dequantise()) < error(grid.round(weight, torch.float64).dequantise())


def naive_sparsegpt(weight: Tensor, gram: Tensor, prune: int, group: int) -> tuple[Tensor, Tensor]:
    """arXiv:2301.00774, algorithm 1 with N:M masks chosen group by group."""
    left = weight.clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(gram, 0.01)), upper=True)
    keep = torch.ones_like(weight, dtype=torch.bool)
    for column in range(weight.shape[1]):
        if column % group == 0:
            block = left[:, column:column + group] ** 2 / upper.diagonal()[column:column + group] ** 2
            keep[:, column:column + group] = keep_all_but(block, prune, group)
        new = left[:, column] * keep[:, column]
        error = (left[:, column] - new) / upper[column, column]
        left[:, column:] -= error[:, None] * upper[column, column:]
        left[:, column] = new
    return left, keep


@pytest.mark.parametrize(("prune", "group"), [(2, 4), (1, 8), (4, 8)])
def test_sparsegpt_is_the_published_algorithm(prune: int, group: int) -> None:
    weight, gram = problem()
    order = torch.arange(weight.shape[1])
    expected, kept = naive_sparsegpt(weight, gram, prune, group)
    found, keep = sparsegpt(weight, reversed_factor(gram, order, 0.01), prune, group)
    assert torch.equal(keep, kept)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert bool((found[~keep] == 0).all())


def test_sparsegpt_prunes_the_asked_fraction() -> None:
    weight, gram = problem()
    _, keep = sparsegpt(weight, reversed_factor(gram, torch.arange(192), 0.01), prune_fraction=0.25)
    assert keep.double().mean() == 0.75


def test_factor_reproduces_the_damped_gram() -> None:
    _, gram = problem()
    order = visiting_order(gram.diagonal(), True)
    factor = reversed_factor(gram, order, 0.05).triu()
    backwards = order.flip(0)
    torch.testing.assert_close(factor.mT @ factor, damped(gram, 0.05)[backwards][:, backwards])


def test_a_gram_that_is_not_positive_definite_is_an_error() -> None:
    with pytest.raises(NumericsError, match="raise damp"):
        reversed_factor(-torch.eye(4) + 5 * torch.diag(torch.tensor([1.0, 0, 0, 0])), torch.arange(4), 0.0)
