"""The low-rank correction against the published route through a Cholesky factor's inverse, and against descent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tsotsallm.numerics import lowrank
from tsotsallm.numerics.lowrank import low_rank_correction


def problem(d_out: int, d_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(d_out)
    inputs = torch.randn(4 * d_in, d_in, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, d_in)
    return torch.randn(d_out, d_in, generator=generator, dtype=torch.float64), torch.linalg.cholesky(inputs.mT @ inputs)


def weighted(root: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda columns: root @ (root.mT @ columns)


@pytest.mark.parametrize(("d_out", "d_in"), [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 3, 8, 12])
def test_it_is_the_published_formula(d_out: int, d_in: int, rank: int) -> None:
    delta, root = problem(d_out, d_in)
    left, right, squares = low_rank_correction(delta, weighted(root), rank)
    u, s, vh = torch.linalg.svd(delta @ root)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root)
    torch.testing.assert_close(left @ right, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(squares, s.square()[:rank], rtol=1e-8, atol=1e-6)
    left_over = ((delta - left @ right) @ root).square().sum()
    torch.testing.assert_close(left_over, s.square()[rank:].sum(), rtol=1e-8, atol=1e-6)


def test_no_descent_gets_below_it() -> None:
    delta, root = problem(10, 14)
    left, right, _ = low_rank_correction(delta, weighted(root), 3)
    best = float(((delta - left @ right) @ root).square().sum())
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(10, 3, generator=generator, dtype=torch.float64).requires_grad_()
    a = torch.randn(3, 14, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([a, b], max_iter=2000, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = ((delta - b @ a) @ root).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert best <= float(loss().detach()) <= best * 1.01


def test_weighted_by_the_inputs_it_is_never_worse_than_plain_svd() -> None:
    delta, root = problem(24, 18)
    for rank in (1, 4, 9):
        errors = [float(((delta - left @ right) @ root).norm()) for left, right, _ in
                  (low_rank_correction(delta, weighted(root), rank), low_rank_correction(delta, None, rank))]
        assert errors[0] <= errors[1]


def test_iterated_directions_remove_as_much_as_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, root = problem(200, 150)
    exact = low_rank_correction(delta, weighted(root), 12)
    monkeypatch.setattr(lowrank, "EXACT_WIDTH", 10)
    iterated = low_rank_correction(delta, weighted(root), 12)
    errors = [float(((delta - left @ right) @ root).square().sum()) for left, right, _ in (exact, iterated)]
    assert errors[0] <= errors[1] <= errors[0] * (1 + 1e-4)
