"""One weight matrix and everything that was done to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsotsallm.checkpoint import packing
from tsotsallm.checkpoint.adapter import LowRank
from tsotsallm.numerics.grids import Stored


@dataclass
class Linear:
    """A linear of one layer while stages edit it.

    name       module name inside the layer, such as `mlp.down_proj`
    reference  (d_out, d_in) float32: the target of corrections, the original weight
    storage    the floating-point type in which its values or scales are stored
    values     (d_out, d_in) float32: its current dense values; None means the reference itself
    mask       (d_out, d_in) bool: True where kept; None when nothing was pruned
    stored     its codes on a grid, once quantised
    low_rank   a correction B·A beside it
    edited     whether anything was done to it
    """

    name: str
    reference: Tensor
    storage: torch.dtype
    values: Tensor | None = None
    mask: Tensor | None = None
    stored: Stored | None = None
    low_rank: LowRank | None = None
    edited: bool = False

    @property
    def dense(self) -> Tensor:
        """The dense values before rounding to storage, (d_out, d_in) float32."""
        return self.reference if self.values is None else self.values

    @property
    def d_out(self) -> int:
        """Number of outputs."""
        return self.reference.shape[0]

    @property
    def d_in(self) -> int:
        """Number of inputs."""
        return self.reference.shape[1]

    def prune(self, keep: Tensor, values: Tensor | None = None) -> None:
        """Zero the weights where `keep` (d_out, d_in) is False, in addition to those pruned before.

        `values` (d_out, d_in) are compensated weights that replace the dense ones.
        """
        self.mask = keep if self.mask is None else self.mask & keep
        self.values = (self.dense if values is None else values) * self.mask
        self.stored, self.edited = None, True

    def quantise(self, stored: Stored) -> None:
        """Replace the dense values by codes on a grid."""
        self.stored, self.values, self.edited = stored, None, True

    def compensate(self, left: Tensor, right: Tensor, bits: int = 16) -> None:
        """Keep B (d_out, r) and A (r, d_in) beside the values, rounded to storage or, with `bits` 8, to 8 bits."""
        self.low_rank = (LowRank.in_8_bits(left, right, self.storage) if bits == 8 else
                         LowRank(left.to(self.storage), right.to(self.storage)))
        self.edited = True

    def effective(self) -> Tensor:
        """The weight as a reader of the written file gets it, storage rounding included, (d_out, d_in) float32."""
        base = self.stored.dequantise() if self.stored is not None else self.dense.to(self.storage).float()
        return base if self.low_rank is None else self.low_rank.added_to(base)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to write to the file, by name inside the layer."""
        beside = self.low_rank.tensors(self.name) if self.low_rank is not None else {}
        if self.stored is not None:
            return beside | {f"{self.name}.{suffix}": tensor for suffix, tensor in packing.pack(self.stored).items()}
        return beside | {f"{self.name}.weight": self.dense.to(self.storage)}
