"""What is gathered of a linear's inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tsotsallm.numerics.gptq import reversed_factor


class Gram:
    """H = Xᵀ X over all calibration tokens, (d_in, d_in) float32; linears that read the same input share it."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.matrix: Tensor | None = torch.zeros(width, width, device=device)
        self.tokens = 0
        self._diagonal: Tensor | None = None
        self._factors: dict[tuple[float, str], tuple[Tensor, Tensor]] = {}

    def add(self, inputs: Tensor) -> None:
        """Add the inputs of some tokens, (..., d_in)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        assert self.matrix is not None
        self.matrix.addmm_(rows.mT, rows)
        self.tokens += len(rows)

    @property
    def width(self) -> int:
        return len(self.diagonal)

    @property
    def diagonal(self) -> Tensor:
        """Sums of squares of every input, (d_in,)."""
        if self._diagonal is None:
            assert self.matrix is not None
            self._diagonal = self.matrix.diagonal().clone()
        return self._diagonal

    @property
    def norms(self) -> Tensor:
        """‖X_j‖₂ of every input j, (d_in,)."""
        return self.diagonal.sqrt()

    def times(self, columns: Tensor) -> Tensor:
        """H·M for M (d_in, k); by its factor where the Gram itself has made room for it, damping included."""
        if self.matrix is not None:
            return self.matrix @ columns
        factor, order = next(iter(self._factors.values()))
        backwards = order.flip(0)
        found = torch.empty_like(columns)
        found[backwards] = factor.mT @ (factor @ columns[backwards])
        return found

    def factor(self, damp: float, visit: str, order_of: Callable[[Tensor], Tensor], *,
               last: bool = False) -> tuple[Tensor, Tensor]:
        """Reversed Cholesky factor and visiting order; computed once for each damp and kind of order.

        `visit` names the kind of order and `order_of` makes it from the Gram's diagonal. `last` says that nobody needs the
        matrix afterwards, so that its memory is reused.
        """
        key = (damp, visit)
        if key not in self._factors:
            order = order_of(self.diagonal)
            matrix = self.matrix
            assert matrix is not None
            if last:
                self.matrix = None
            self._factors[key] = (reversed_factor(matrix, order, damp, overwrite=last), order)
        return self._factors[key]
