"""The best low-rank correction of an error, weighted by the inputs of the linear.

EoRA (arXiv:2410.21271) minimises ‖(Δ − B·A)·X‖ over matrices of rank r: with H = X Xᵀ = C Cᵀ, the best rank-r fit of Δ·C
is U_r U_rᵀ Δ·C (Eckart and Young), where U_r are the leading left singular vectors of Δ·C. Multiplied by C⁻¹ that is
U_r U_rᵀ Δ: the error itself, projected onto the r output directions that it disturbs most. So B = U_r, A = U_rᵀ Δ, where U_r
are the leading eigenvectors of Δ H Δᵀ: no Cholesky factor, no inverse and no damping are needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tsotsallm.machine import threads_for

EXACT_WIDTH = 1024
OVERSAMPLED = 16
MOST_ROUNDS = 60
SETTLED = 1e-5


def low_rank_correction(delta: Tensor, times: Callable[[Tensor], Tensor] | None,
                        rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """B (d_out, r) and A (r, d_in) that minimise tr((Δ − B·A) H (Δ − B·A)ᵀ), and what each direction removes of it, (r,).

    delta (d_out, d_in); times(M) returns H·M for M (d_in, k); None means H = identity, a plain SVD. Directions are in
    falling order of what they remove; r is `rank`, or less where a side of delta is shorter. Up to 1024 outputs the
    eigenvectors of Δ H Δᵀ are exact; above that, a block of r + 16 directions is iterated until the error that it removes
    changes by less than 1e-5 of itself.
    """
    d_out = delta.shape[0]
    rank = min(rank, *delta.shape)

    def seen(directions: Tensor) -> Tensor:
        """Δ H Δᵀ · directions, (d_out, k)."""
        inputs = delta.mT @ directions
        return delta @ (inputs if times is None else times(inputs))

    with threads_for(delta.numel() * min(delta.shape)):
        if d_out <= EXACT_WIDTH:
            values, vectors = torch.linalg.eigh(_symmetric(seen(torch.eye(d_out, dtype=delta.dtype, device=delta.device))))
        else:
            values, vectors = _leading(seen, delta, min(rank + OVERSAMPLED, d_out), rank)
        directions = vectors[:, -rank:].flip(1)
        return directions, directions.mT @ delta, values.clamp(min=0).flip(0)[:rank]


def _leading(seen: Callable[[Tensor], Tensor], delta: Tensor, width: int, rank: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvalues and eigenvectors, in rising order, by subspace iteration with Rayleigh–Ritz projection."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(delta.shape[0], width, generator=generator, dtype=delta.dtype).to(delta.device)
    removed = torch.zeros((), dtype=delta.dtype, device=delta.device)
    for _ in range(MOST_ROUNDS):
        basis = torch.linalg.qr(seen(block)).Q
        block = seen(basis)
        values, turn = torch.linalg.eigh(_symmetric(basis.mT @ block))
        before, removed = removed, values[-rank:].sum()
        if (removed - before).abs() <= SETTLED * removed.abs():
            break
    return values, basis @ turn


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
