"""Trained numbers of weights on grids: what is written is what was trained, with the gradients of the plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsotsallm.errors import RecipeError
from tsotsallm.numerics.ggml import LAYOUTS, GgmlGrid, decode, encode
from tsotsallm.numerics.grids import IntegerGrid, NormalFloatGrid, Quantised, Stored
from tsotsallm.numerics.rounding import round_plainly
from tsotsallm.numerics.tuning import CODES, moves_towards, require_even, scale_shapes, tuned, tuned_values

KINDS = (*LAYOUTS, "int", "asymmetric", "nf4")


def weight_of(seed: int = 3) -> Tensor:
    return torch.randn(6, 512, generator=torch.Generator().manual_seed(seed)) * 0.1


def stored_as(kind: str) -> Stored:
    if kind in LAYOUTS:
        return round_plainly(weight_of(), GgmlGrid(kind))
    if kind == "nf4":
        return NormalFloatGrid().round(weight_of(), torch.bfloat16)
    return IntegerGrid(3, 64, symmetric=kind == "int").round(weight_of(), torch.bfloat16)


def some(stored: Stored, size: float, *, codes: bool, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = scale_shapes(stored.grid, *stored.codes.shape) | ({CODES: tuple(stored.codes.shape)} if codes else {})
    return {name: (torch.randn(shape, generator=generator) * (0.7 if name == CODES else size)).requires_grad_()
            for name, shape in shapes.items()}


def moves(kind: str) -> bool:
    """Whether the codes of a kind may move."""
    try:
        require_even(stored_as(kind))
    except RecipeError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_is_read_back(kind: str) -> None:
    stored = stored_as(kind)
    unchanged = {name: torch.zeros(shape) for name, shape in scale_shapes(stored.grid, *stored.codes.shape).items()}
    assert torch.equal(tuned_values(stored, unchanged), stored.dequantise())
    trained = some(stored, 0.1, codes=moves(kind))
    changed = tuned(stored, trained)
    assert torch.equal(tuned_values(stored, trained).detach(), changed.dequantise())
    if kind in LAYOUTS:
        assert torch.equal(decode(encode(changed), GgmlGrid(kind)).dequantise(), changed.dequantise())
    assert not torch.equal(changed.dequantise(), stored.dequantise())
    assert int(changed.codes.min()) >= stored.grid.lowest
    assert int(changed.codes.max()) <= stored.grid.highest
    assert int((changed.codes.int() - stored.codes.int()).abs().max()) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_formula_without_rounding(kind: str) -> None:
    """A naive formula, in float64, from columns: the change of a number moves every weight that it is part of."""
    stored = stored_as(kind)
    trained = some(stored, 0.0, codes=False)
    direction = torch.randn(6, 512, generator=torch.Generator().manual_seed(8))
    (tuned_values(stored, trained) * direction).sum().backward()
    names = scale_shapes(stored.grid, *stored.codes.shape)

    def wide(numbers: Tensor) -> Tensor:
        return numbers.double().repeat_interleave(512 // numbers.shape[1], 1)

    def narrow(products: Tensor, shape: tuple[int, ...]) -> Tensor:
        return products.view(6, shape[1], -1).sum(-1)

    if isinstance(stored, Quantised):       # `dequantise` rounds the values to 16 bits
        points = 0 if stored.zero_points is None else wide(stored.zero_points)
        values = (stored.grid.levels(stored.codes).double() - points) * wide(stored.scales)
    else:
        values = stored.dequantise().double()
    minimum = None
    if "low" in names:
        minimum = wide(stored.low) if "lows" not in names else -(wide(stored.low) * wide(stored.lows))
    scaled = values if minimum is None else values - minimum
    for name, shape in names.items():
        part = scaled if name in ("step", "scales") else minimum
        assert part is not None
        assert trained[name].grad is not None
        torch.testing.assert_close(trained[name].grad.double(), narrow(part * direction.double(), shape), rtol=1e-4,
                                   atol=2e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if moves(kind)])
def test_moves_begin_near_the_aim_and_change_no_code(kind: str) -> None:
    stored, aim = stored_as(kind), weight_of() + 0.02 * weight_of(4)
    begin = moves_towards(stored, aim)
    assert torch.equal(tuned(stored, {CODES: begin}).codes, stored.codes)
    assert float(begin.abs().max()) < 0.5
    step = (tuned(stored, {CODES: torch.full_like(begin, 0.6)}).dequantise() - stored.dequantise())
    towards = (aim - stored.dequantise()) * begin * step
    assert bool((towards >= -1e-9).all())


def test_levels_that_are_not_evenly_spaced_are_refused() -> None:
    with pytest.raises(RecipeError, match="nf4 are not evenly spaced"):
        require_even(stored_as("nf4"))
