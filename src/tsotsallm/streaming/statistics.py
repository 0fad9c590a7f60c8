"""What is gathered of a linear's inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tsotsallm.numerics.gptq import reversed_factor


class Gram:
    """H = Xᵀ W X over all calibration tokens, (d_in, d_in) float32; linears that read the same input share it.

    W weighs the tokens, all alike by default. With what the original model's linear reads of the same tokens, X₀, the
    Gram also knows the lag X₀ᵀ W X − H: how the inputs have moved since.
    """

    def __init__(self, width: int, device: torch.device, *, follows: bool = False) -> None:
        self.matrix: Tensor | None = torch.zeros(width, width, device=device)
        self.lag: Tensor | None = torch.zeros(width, width, device=device) if follows else None
        self.tokens = 0
        self.squares: dict[str, float] = {}     # linear -> mean square of the loss's gradient by its outputs
        self.outputs: dict[str, Tensor] = {}    # linear -> the metric of its outputs (see `sensitivity.weights_of`)
        self._diagonal: Tensor | None = None
        self._factors: dict[tuple[float, str], tuple[Tensor, Tensor]] = {}

    def add(self, inputs: Tensor, weights: Tensor | None = None, original: Tensor | None = None) -> None:
        """Add the inputs of some tokens, (..., d_in), with their weights (tokens,) and the original's inputs."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        weighed = rows if weights is None else rows * weights.to(rows)[:, None]
        assert self.matrix is not None
        self.matrix.addmm_(weighed.mT, rows)
        if self.lag is not None:
            assert original is not None
            self.lag.addmm_((original.reshape(rows.shape) - rows).mT, weighed)
        self.tokens += len(rows)

    def followed(self, weight: Tensor, damp: float, visit: str) -> Tensor:
        """What to add to a weight W, (d_out, d_in), so that its outputs on today's inputs are those on the original's.

        W·(lag)·(H + damping)⁻¹: the least-squares answer (arXiv:2504.02692, eq. 5), by the factor made before.
        """
        assert self.lag is not None
        factor, order = self._factors[damp, visit]
        backwards = order.flip(0)
        wanted = (weight @ self.lag)[:, backwards]
        found = torch.empty_like(wanted)
        found[:, backwards] = torch.cholesky_solve(wanted.mT, factor, upper=True).mT
        return found

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
