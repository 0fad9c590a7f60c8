"""Which weights to keep: N:M and unstructured masks from a saliency. True keeps a weight, False prunes it."""

from __future__ import annotations

import torch
from torch import Tensor

from tsotsallm.numerics.grids import require_divisible


def wanda_saliency(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|W|·‖X‖₂ of every weight, (d_out, d_in) (arXiv:2306.11695, eq. 1); input_norm is (d_in,)."""
    return weight.abs() * input_norm


def keep_all_but(saliency: Tensor, prune: int, group: int) -> Tensor:
    """A mask (d_out, d_in) bool that prunes the `prune` least salient of every `group` neighbouring columns of a row.

    Ties are broken by pruning the lower column. Raises RecipeError where `group` does not divide d_in.
    """
    d_out, d_in = saliency.shape
    require_divisible({"a linear": d_in}, group)
    parts = saliency.reshape(d_out, d_in // group, group)
    if group <= 16:
        keep = _rank(parts) >= prune
    else:
        lowest = parts.sort(dim=-1, stable=True).indices[..., :prune]
        keep = torch.ones_like(parts, dtype=torch.bool).scatter_(-1, lowest, False)
    return keep.view(d_out, d_in)


def _rank(parts: Tensor) -> Tensor:
    """Rank of each entry in its group, the lower column first in ties, by comparing pairs: far faster than a sort."""
    group = parts.shape[-1]
    columns = [parts[..., column].contiguous() for column in range(group)]
    ranks = [torch.zeros(parts.shape[:-1], dtype=torch.int8, device=parts.device) for _ in range(group)]
    for low in range(group):
        for high in range(low + 1, group):
            lower_first = columns[low] <= columns[high]
            ranks[high] += lower_first
            ranks[low] += ~lower_first
    return torch.stack(ranks, dim=-1)


def keep_fraction(saliency: Tensor, prune_fraction: float) -> Tensor:
    """A mask (d_out, d_in) bool that prunes the least salient share of every row, rounded down to whole weights.

    Ties are broken by pruning the lower column.
    """
    count = int(saliency.shape[1] * prune_fraction)
    lowest = saliency.sort(dim=-1, stable=True).indices[:, :count]
    return torch.ones_like(saliency, dtype=torch.bool).scatter_(1, lowest, False)
