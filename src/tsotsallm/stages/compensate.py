"""A low-rank correction of what the edits before it did to a linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tsotsallm.checkpoint.linear import Linear
from tsotsallm.errors import RecipeError
from tsotsallm.numerics.lowrank import low_rank_correction
from tsotsallm.stages.base import LinearEdit
from tsotsallm.streaming.statistics import Gram


@dataclass(frozen=True)
class Compensate(LinearEdit):
    """Add B·A of rank `rank` to every linear, so that its outputs are as near as can be to those of its reference.

    method  eora: nearest on the calibration inputs (arXiv:2410.21271); svd: nearest in the weights themselves
    merge   add it to dense weights instead of keeping it as an adapter beside the base
    """

    name: ClassVar[str] = "compensate"
    rank: int = 32
    method: Literal["eora", "svd"] = "eora"
    merge: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"compensate.rank is {self.rank}; it takes 1 or more")

    @property
    def needs_gram(self) -> bool:
        return self.method == "eora"

    @property
    def completes_edit_before(self) -> bool:
        return True

    @property
    def adapter_rank(self) -> int:
        return 0 if self.merge else self.rank

    def flops(self, d_out: int, d_in: int) -> float:
        # Δ·H·Δᵀ of all outputs where it is exact, and its eigenvectors; see numerics.lowrank
        width = min(d_out, 1024) if d_out <= 1024 else self.rank + 16
        rounds = 1 if d_out <= 1024 else 15
        gram = d_in ** 2 if self.method == "eora" else 0
        return 2.0 * rounds * width * (2 * d_out * d_in + gram) + 10.0 * width ** 3

    def edit(self, linear: Linear, gram: Gram | None, layer: int, *, last: bool) -> None:
        delta = linear.reference - linear.effective()
        left, right, _ = low_rank_correction(delta, None if self.method == "svd" or gram is None else gram.times, self.rank)
        if not self.merge:
            linear.compensate(left, right)
            return
        if linear.stored is not None:
            raise RecipeError("compensate.merge adds to dense weights, but quantize made codes of them; leave merge out, or "
                              "put compensate before quantize")
        linear.values = linear.dense + left @ right
        if linear.mask is not None:
            linear.values *= linear.mask
