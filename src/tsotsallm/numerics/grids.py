"""Integer and NF4 grids: the sets of values that a quantised weight may take."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tsotsallm.errors import RecipeError
from tsotsallm.files import JsonObject
from tsotsallm.numerics.ggml import LAYOUTS, Blocks, GgmlGrid
from tsotsallm.timing import counted

OFF_THE_TIE = 1 - 2.0 ** -12
NARROWER = tuple(1 - step / 40 for step in range(1, 21))
"""Shares of a group's range that `IntegerGrid.searched` tries besides all of it."""


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
    """A weight on a grid: value = (level of the code − zero_point) · scale, rounded to the scale's type.

    codes        (d_out, d_in) int8, in [−2^(bits−1), 2^(bits−1) − 1]
    scales       (d_out, groups), in the type that the file stores
    zero_points  (d_out, groups) int8, or None on a symmetric grid
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    grid: IntegerGrid

    def rows_at(self, rows: Tensor) -> Quantised:
        """Some rows of the weight, or all of them in another order; rows (k,) int64."""
        points = None if self.zero_points is None else self.zero_points[rows]
        return Quantised(self.codes[rows], self.scales[rows], points, self.grid)

    def to(self, device: torch.device) -> Quantised:
        """The same weight on a device."""
        points = None if self.zero_points is None else self.zero_points.to(device)
        return Quantised(self.codes.to(device), self.scales.to(device), points, self.grid)

    @property
    def finite(self) -> bool:
        """Whether every scale is a finite number."""
        return bool(torch.isfinite(self.scales.float()).all())

    def dequantise(self) -> Tensor:
        """The values as a reader of the file computes them, in float32, shape (d_out, d_in)."""
        d_out, d_in = self.codes.shape
        groups = self.scales.shape[1]
        values = self.grid.levels(self.codes).view(d_out, groups, d_in // groups)
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
        """The lowest code, −2^(bits−1)."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The highest code, 2^(bits−1) − 1."""
        return (1 << (self.bits - 1)) - 1

    def fit(self, weight: Tensor, storage: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Scales in `storage` and zero points, both (d_out, groups), that cover each group's range.

        The rule is that of compressed-tensors. Symmetric: scale = 2·max|w| / (2^bits − 1), less 2⁻¹² of it; otherwise the
        largest weight would be exactly halfway between two codes, and rounding noise would decide. Asymmetric: scale =
        (max − min) / (2^bits − 1), the range widened to include zero. A group of zeros gets scale 1.
        """
        return self._covering(weight, storage, 1.0)

    def searched(self, weight: Tensor, storage: torch.dtype, importance: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same, but each group covers the share of its range, 0.5 to 1, with which rounding to nearest leaves the least
        Σ importance · error²; importance (d_in,). Weights beyond the range get the code at its end."""
        weights = importance.view(-1, self.group or weight.shape[1])
        best = self._covering(weight, storage, 1.0)
        least = self._errors(weight, weights, best)
        for share in NARROWER:
            tried = self._covering(weight, storage, share)
            errors = self._errors(weight, weights, tried)
            better = errors < least
            least = torch.where(better, errors, least)
            points = None if best[1] is None or tried[1] is None else torch.where(better, tried[1], best[1])
            best = torch.where(better, tried[0], best[0]), points
        return best

    def _errors(self, weight: Tensor, importance: Tensor, found: tuple[Tensor, Tensor | None]) -> Tensor:
        """Σ importance · error² of every group, (d_out, groups), where a weight is rounded to nearest."""
        rounded = Quantised(self.encode(weight, *found), *found, self).dequantise()
        return (rounded.sub_(weight).square_().view(len(weight), *importance.shape) * importance).sum(-1)

    def _covering(self, weight: Tensor, storage: torch.dtype, share: float) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points that cover a share of each group's range."""
        d_out, d_in = weight.shape
        parts = weight.view(d_out, -1, self.group or d_in)
        steps = (1 << self.bits) - 1
        if self.symmetric:
            scales = parts.abs().amax(-1) * (share * 2 * OFF_THE_TIE / steps)
        else:
            low, high = share * parts.amin(-1).clamp(max=0), share * parts.amax(-1).clamp(min=0)
            scales = (high - low) / steps
        scales = torch.where(scales > 0, scales, torch.ones_like(scales)).to(storage)
        tiny = torch.finfo(storage).tiny
        scales = scales.clamp(min=tiny)
        if self.symmetric:
            return scales, None
        zero_points = (self.lowest - low / scales.float()).round().clamp(self.lowest, self.highest)
        return scales, zero_points.to(torch.int8)

    def encode(self, weight: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensor:
        """The codes nearest to a weight, (d_out, d_in) int8, under scales and zero points from `fit`."""
        d_out, d_in = weight.shape
        parts = weight.view(d_out, scales.shape[1], -1) / scales.to(weight.dtype).unsqueeze(-1)
        if zero_points is not None:
            parts += zero_points.unsqueeze(-1)
        return self.nearest(parts).view(d_out, d_in)

    def nearest(self, values: Tensor) -> Tensor:
        """Codes (int8) of the levels nearest to `values`, which are in units of the scale and are overwritten."""
        return values.round_().clamp_(self.lowest, self.highest).to(torch.int8)

    def levels(self, codes: Tensor) -> Tensor:
        """The values that codes stand for, in units of the scale, float32."""
        return codes.float()

    @property
    def plain_hf(self) -> bool:
        """Whether a plain Hugging Face checkpoint can hold weights on this grid."""
        return True

    @property
    def zero(self) -> int:
        """The code that stands for zero on a grid without zero points."""
        return 0

    @property
    def holds_zeros(self) -> bool:
        """Whether pruned weights stay exactly zero."""
        return True

    def plain(self) -> dict[str, object]:
        """The grid as JSON, from which `grid_from` makes an equal one."""
        return {"type": "int", **asdict(self)}

    def stored_bytes(self, d_out: int, d_in: int, scale_bytes: int) -> int:
        """Bytes of one packed linear: codes, scales of `scale_bytes` each, zero points, shape."""
        groups = d_in // (self.group or d_in)
        zero_points = 0 if self.symmetric else groups * 4 * -(-d_out * self.bits // 32)
        return d_out * 4 * -(-d_in * self.bits // 32) + d_out * groups * scale_bytes + zero_points + 16

    @counted("rounding")
    def round(self, weight: Tensor, storage: torch.dtype, keep: Tensor | None = None,
              importance: Tensor | None = None) -> Quantised:
        """Round a weight (d_out, d_in) to nearest; where `keep` (d_out, d_in) is False the value becomes exactly zero.

        With the `importance` of columns, (d_in,), scales are `searched`.
        """
        if keep is not None:
            weight = weight * keep          # zero is a level of every grid
        scales, zero_points = (self.fit(weight, storage) if importance is None
                               else self.searched(weight, storage, importance))
        return Quantised(self.encode(weight, scales, zero_points), scales, zero_points, self)


def _normal_float_levels() -> Tensor:
    """NF4 (arXiv:2305.14314, appendix E): quantiles of the normal distribution, 7 below zero and 8 above, scaled to ±1."""
    most = 0.9677083
    above = torch.special.ndtri(torch.linspace(most, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(most, 0.5, 8, dtype=torch.float64)[:-1])
    levels: Tensor = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)]) / above.max()
    return levels.float()


@dataclass(frozen=True)
class NormalFloatGrid(IntegerGrid):
    """NF4: sixteen levels that normally distributed weights use evenly, scaled to the largest of every group."""

    bits: int = 4
    group: int | None = 64
    symmetric: bool = True

    def _covering(self, weight: Tensor, storage: torch.dtype, share: float) -> tuple[Tensor, Tensor | None]:
        """Scales (d_out, groups): a share of the largest |w| of every group; 1 where all are zero."""
        scales = share * weight.view(len(weight), -1, self.group or weight.shape[1]).abs().amax(-1)
        scales = torch.where(scales > 0, scales, torch.ones_like(scales)).to(storage)
        return scales.clamp(min=torch.finfo(storage).tiny), None

    def nearest(self, values: Tensor) -> Tensor:
        """Codes (int8) of the levels nearest to `values`, which are in units of the scale."""
        table = _normal_float_levels().to(values)
        return (torch.bucketize(values, (table[1:] + table[:-1]) / 2) + self.lowest).to(torch.int8)

    def levels(self, codes: Tensor) -> Tensor:
        """The values that codes stand for, in [−1, 1], float32."""
        return _normal_float_levels().to(codes.device)[codes.int() - self.lowest]

    @property
    def plain_hf(self) -> bool:
        """False: weights on NF4 go into the project's own container."""
        return False

    @property
    def zero(self) -> int:
        """The code of the level at zero, the eighth of sixteen."""
        return self.lowest + 7

    def plain(self) -> dict[str, object]:
        """The grid as JSON, from which `grid_from` makes an equal one."""
        return super().plain() | {"type": "nf4"}


Grid = IntegerGrid | GgmlGrid
Stored = Quantised | Blocks
"""A weight on a grid."""

GRIDS = ("int", "nf4", *LAYOUTS)
"""The names of all kinds of grids, as files spell them."""


def grid_from(plain: JsonObject) -> Grid:
    """The grid that `plain` described; raises KeyError for a kind that is not in GRIDS."""
    fields = dict(plain)
    kind = fields.pop("type")
    return GgmlGrid(kind) if kind in LAYOUTS else {"int": IntegerGrid, "nf4": NormalFloatGrid}[kind](**fields)
