"""A linear whose weight stays packed in memory and is unpacked for every product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsotsallm.checkpoint.adapter import LowRank
from tsotsallm.checkpoint.packing import Packed


class PackedLinear(nn.Module):
    """A frozen linear on a grid, with the low-rank correction beside it, if any."""

    def __init__(self, packed: Packed, bias: Tensor | None, beside: LowRank | None) -> None:
        super().__init__()
        self.packed, self.bias, self.beside = packed, bias, beside

    def unpacked(self) -> Tensor:
        """The effective weight, (d_out, d_in) float32."""
        weight = self.packed.unpack().dequantise()
        if self.beside is not None:
            weight = self.beside.added_to(weight)
        return weight

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        product: Tensor = _Product.apply(inputs, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """x·Wᵀ with W unpacked for the product and again for its gradient, never kept."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, base: PackedLinear) -> Tensor:
        ctx.base = base
        return functional.linear(inputs, base.unpacked())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.base.unpacked(), None
