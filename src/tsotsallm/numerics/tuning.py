"""The numbers of a weight on a grid as functions of trained ones: scales and minima as factors, codes as moves.

Every number that a file stores is rounded as the file stores it, and its gradient passes the rounding unchanged (the
straight-through estimator, arXiv:1308.3432), so that what is trained is what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tsotsallm.errors import RecipeError
from tsotsallm.numerics.ggml import Blocks, half
from tsotsallm.numerics.grids import Grid, IntegerGrid, NormalFloatGrid, Quantised, Stored

CODES = "codes"


def scale_shapes(grid: Grid, d_out: int, d_in: int) -> dict[str, tuple[int, int]]:
    """The shapes of the stored scales and minima of a weight on a grid, by name: a factor is trained for each."""
    if isinstance(grid, IntegerGrid):
        return {"scales": (d_out, d_in // (grid.group or d_in))}
    layout = grid.layout
    of_blocks = ("step", "low") if layout.minimum else ("step",)
    of_parts = () if layout.scales is None else ("scales", "lows") if layout.minimum else ("scales",)
    return (dict.fromkeys(of_blocks, (d_out, d_in // layout.block))
            | dict.fromkeys(of_parts, (d_out, d_in // layout.part)))


def require_even(stored: Stored) -> None:
    """Raise RecipeError unless neighbouring codes are one step apart everywhere, so that a code can move by one."""
    uneven = isinstance(stored.grid, NormalFloatGrid) or getattr(getattr(stored.grid, "layout", None), "levels", None)
    if uneven:
        kind = stored.grid.plain()["type"]
        raise RecipeError(f"tune moves codes by one step, but the levels of {kind} are not evenly spaced; leave codes out")


def moves_towards(stored: Stored, aim: Tensor) -> Tensor:
    """Moves of codes that bring a weight as near to `aim` as they can without changing a code, (d_out, d_in) float32.

    They are where training begins: a code whose weight is near the border to the next moves first, as in AutoRound
    (arXiv:2309.05516), which begins with plain rounding.
    """
    step, offset = _spread(stored)
    codes = torch.where(step != 0, (aim - offset) / step, stored.codes.float())
    return (codes - stored.codes).clamp(-0.49, 0.49)


def tuned_values(stored: Stored, trained: Mapping[str, Tensor]) -> Tensor:
    """The values of a weight with its numbers changed, (d_out, d_in) float32, with gradients for `trained`.

    trained  scales and minima -> δ of their shapes: each number counts 1 + δ times; codes -> (d_out, d_in), what is added
             to each before it is rounded, at most one up or down
    """
    changed = _changed(stored, trained)
    if isinstance(stored, Quantised):
        return _quantised_values(stored, changed)
    codes, step, scales = changed["codes"], changed["step"], changed.get("scales")
    layout, d_out = stored.grid.layout, len(codes)
    parts = layout.block // layout.part

    def per_part(values: Tensor) -> Tensor:
        return values.repeat_interleave(parts, dim=1)

    values = codes.view(d_out, -1, layout.part) * (step if scales is None else per_part(step) * scales).unsqueeze(-1)
    if "low" in changed:
        low, lows = changed["low"], changed.get("lows")
        values = values + (low if lows is None else -(per_part(low) * lows)).unsqueeze(-1)
    return values.view(codes.shape)


def tuned(stored: Stored, trained: Mapping[str, Tensor]) -> Stored:
    """The weight whose `dequantise` gives `tuned_values`, its numbers rounded as they are stored."""
    changed: dict[str, Any] = {name: values.detach().to(getattr(stored, name).dtype)
                               for name, values in _changed(stored, trained).items()}
    return replace(stored, **changed)


def _changed(stored: Stored, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All numbers of a weight with what is trained, as the file will store them, float32."""
    found = {CODES: stored.codes.float()}
    if CODES in trained:
        moved = (found[CODES] + trained[CODES].clamp(-1, 1)).clamp(stored.grid.lowest, stored.grid.highest)
        found[CODES] = _through(moved, moved.round())
    for name in scale_shapes(stored.grid, *stored.codes.shape):
        values = getattr(stored, name).float()
        if name in trained:
            values = values * (1 + trained[name])
            values = _through(values, _as_stored(stored, name, values.detach()))
        found[name] = values
    return found


def _as_stored(stored: Stored, name: str, values: Tensor) -> Tensor:
    if isinstance(stored, Quantised):
        tiny = torch.finfo(stored.scales.dtype).tiny
        return values.to(stored.scales.dtype).float().clamp(min=tiny)
    if name in ("step", "low"):
        return half(values)
    bounds = stored.grid.layout.scales
    assert bounds is not None
    return values.round().clamp(*bounds)


def _quantised_values(stored: Quantised, changed: Mapping[str, Tensor]) -> Tensor:
    d_out, d_in = stored.codes.shape
    scales = changed["scales"]
    levels = changed[CODES] if not isinstance(stored.grid, NormalFloatGrid) else stored.grid.levels(stored.codes)
    values = levels.view(d_out, scales.shape[1], -1)
    if stored.zero_points is not None:
        values = values - stored.zero_points.unsqueeze(-1)
    values = values * scales.unsqueeze(-1)
    return _through(values, values.detach().to(stored.scales.dtype).float()).view(d_out, d_in)


def _spread(stored: Stored) -> tuple[Tensor, Tensor]:
    """The step of every code and the value of code zero, both (d_out, d_in) float32."""
    d_in = stored.codes.shape[1]

    def per_column(values: Tensor) -> Tensor:
        return values.repeat_interleave(d_in // values.shape[1], dim=1)

    if isinstance(stored, Blocks):
        step, offsets = per_column(stored.steps()), stored.offsets()
        return step, torch.zeros_like(step) if offsets is None else per_column(offsets)
    step = per_column(stored.scales.float())
    return step, torch.zeros_like(step) if stored.zero_points is None else -step * per_column(stored.zero_points.float())


def _through(values: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, whose gradient is that of `values`."""
    return rounded.detach() + (values - values.detach())
