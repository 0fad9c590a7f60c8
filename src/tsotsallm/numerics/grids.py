"""The sets of values that a quantised weight may take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tsotsallm.errors import RecipeError

OFF_THE_TIE = 1 - 2.0 ** -12


def require_divisible(widths: dict[str, int], group: int, otherwise: str = "") -> None:
    """Raise RecipeError, with the groups that can be used, unless `group` divides the width of every named linear."""
    wrong = {name: width for name, width in widths.items() if width % group}
    if wrong:
        common = math.gcd(*widths.values())
        usable = [str(size) for size in range(2, min(common, 1024) + 1) if common % size == 0]
        found = ", ".join(f"{name} has {width}" for name, width in wrong.items())
        raise RecipeError(f"group {group} must divide the input columns of every linear, but {found}; "
                          f"usable groups: {', '.join(usable) or 'none'}{otherwise}")


@dataclass(frozen=True)
class Quantised:
    """A weight on an integer grid: value = (code − zero_point) · scale, rounded to the scale's type.

    codes        (d_out, d_in) int8, in [−2^(bits−1), 2^(bits−1) − 1]
    scales       (d_out, groups), in the type that the file stores
    zero_points  (d_out, groups) int8, or None on a symmetric grid
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    grid: IntegerGrid

    def dequantise(self) -> Tensor:
        """The values as a reader of the file computes them, in float32, shape (d_out, d_in)."""
        d_out, d_in = self.codes.shape
        groups = self.scales.shape[1]
        values = self.codes.view(d_out, groups, d_in // groups).float()
        if self.zero_points is not None:
            values -= self.zero_points.unsqueeze(-1)
        values *= self.scales.float().unsqueeze(-1)
        return values.to(self.scales.dtype).float().view(d_out, d_in)


@dataclass(frozen=True)
class IntegerGrid:
    """Integers of 2 to 8 bits with one scale for every `group` columns of a row (`None`: the whole row)."""

    bits: int
    group: int | None
    symmetric: bool = True

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def fit(self, weight: Tensor, storage: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Scales (d_out, groups) in `storage` and zero points, covering each group's range (rule of compressed-tensors).

        Symmetric: scale = 2·max|w| / (2^bits − 1), less 2⁻¹² of it: else the largest weight would stand exactly between
        two codes, and rounding noise would choose. Asymmetric: scale = (max − min) / (2^bits − 1), the range widened
        to hold zero. A group of zeros gets scale 1.
        """
        d_out, d_in = weight.shape
        parts = weight.view(d_out, -1, self.group or d_in)
        steps = (1 << self.bits) - 1
        if self.symmetric:
            scales = parts.abs().amax(-1) * (2 * OFF_THE_TIE / steps)
        else:
            low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
            scales = (high - low) / steps
        scales = torch.where(scales > 0, scales, torch.ones_like(scales)).to(storage)
        tiny = torch.finfo(storage).tiny
        scales = scales.clamp(min=tiny)
        if self.symmetric:
            return scales, None
        zero_points = (self.lowest - low / scales.float()).round().clamp(self.lowest, self.highest)
        return scales, zero_points.to(torch.int8)

    def encode(self, weight: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensor:
        """Nearest codes for one weight matrix, (d_out, d_in) int8."""
        d_out, d_in = weight.shape
        parts = weight.view(d_out, scales.shape[1], -1) / scales.to(weight.dtype).unsqueeze(-1)
        if zero_points is not None:
            parts += zero_points.unsqueeze(-1)
        return parts.round_().clamp_(self.lowest, self.highest).to(torch.int8).view(d_out, d_in)

    def round(self, weight: Tensor, storage: torch.dtype, keep: Tensor | None = None) -> Quantised:
        """Round to nearest; where `keep` is False the value becomes exactly zero."""
        if keep is not None:
            weight = weight * keep
        scales, zero_points = self.fit(weight, storage)
        return Quantised(self.encode(weight, scales, zero_points), scales, zero_points, self)
