"""A linear whose weight stays packed in memory and is unpacked for every product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsotsallm.checkpoint.adapter import LowRank
from tsotsallm.checkpoint.packing import Packed
from tsotsallm.numerics.grids import Stored

CPU = torch.device("cpu")


class PackedLinear(nn.Module):
    """A frozen linear on a grid, with the low-rank correction beside it, if any.

    Blocks are unpacked by the CPU, so that on a GPU codes and scales stay in memory, a byte for every weight.
    """

    def __init__(self, packed: Packed, bias: Tensor | None, beside: LowRank | None) -> None:
        super().__init__()
        self.packed, self.bias, self.beside = packed, bias, beside
        self.stored: Stored | None = None

    def unpacked(self, device: torch.device = CPU) -> Tensor:
        """The effective weight, (d_out, d_in) float32."""
        if device.type != "cpu" and self.stored is None:
            self.stored = self.packed.unpack().to(device)
        weight = (self.stored or self.packed.unpack()).dequantise()
        if self.beside is not None:
            weight = self.beside.added_to(weight)
        return weight

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        product: Tensor = _Product.apply(inputs, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product)


class _Product(torch.autograd.Function):
    """x·Wᵀ with W unpacked for the product and again for its gradient, never kept."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, base: PackedLinear) -> Tensor:
        ctx.base = base
        return functional.linear(inputs, base.unpacked(inputs.device))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.base.unpacked(gradients[0].device), None
