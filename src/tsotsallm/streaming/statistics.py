"""What is gathered of a linear's inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tsotsallm.numerics.gptq import reversed_factor
from tsotsallm.timing import counted

PEAK_BLOCKS = (32, 256)
"""The blocks of columns in which llama.cpp rounds what a linear reads to 8 bits: beside grids of 32, and of 256."""
HELD_OUT = 512
"""Tokens whose inputs are held out at most."""
ROWS_SOLVED = 1024
"""Rows of a weight that follow their inputs at a time."""


@dataclass(frozen=True)
class Factor:
    """What rounding column by column works with: H + damping = UᵀU in reverse order.

    upper    the reversed Cholesky factor, (d_in, d_in) float32 upper triangular, of columns in the order of `order` reversed
    order    the order in which columns are visited, (d_in,) int64
    damping  what was added to the diagonal of H
    """

    upper: Tensor
    order: Tensor
    damping: float

    def times(self, columns: Tensor) -> Tensor:
        """(H + damping·I)·M for M (d_in, k)."""
        backwards = self.order.flip(0)
        product = torch.empty_like(columns)
        product[backwards] = self.upper.mT @ (self.upper @ columns[backwards])
        return product

    def solve(self, rows: Tensor) -> Tensor:
        """R·(H + damping·I)⁻¹ for R (k, d_in)."""
        backwards = self.order.flip(0)
        answer = torch.empty_like(rows)
        answer[:, backwards] = torch.cholesky_solve(rows[:, backwards].mT, self.upper, upper=True).mT
        return answer


class Gram:
    """H = Xᵀ W X over all calibration tokens, (d_in, d_in) float32; linears that read the same input share it.

    W weights the tokens, all alike by default. With what the original model's linear reads of the same tokens, X₀, the Gram
    also knows the lag X₀ᵀ W X − H: how the inputs have moved since. A single linear of few outputs is given as `follower`,
    its weight (d_out, d_in): of the lag only follower · lag is then kept, which is smaller. What it answers never depends on
    who asked before: a factor may take the matrix's memory, and the matrix's products are then worked out from the factor.
    """

    def __init__(self, width: int, device: torch.device, *, follows: bool = False, follower: Tensor | None = None,
                 peaks: bool = False) -> None:
        self._matrix: Tensor | None = torch.zeros(width, width, device=device)
        self.follower = follower
        self.lag: Tensor | None = torch.zeros(width, width, device=device) if follows and follower is None else None
        self.moved: Tensor | None = None if follower is None else torch.zeros_like(follower)      # follower · lag
        self.tokens = 0
        self.squares: dict[str, float] = {}     # linear -> mean square of the loss's gradient by its outputs
        self.outputs: dict[str, Tensor] = {}    # linear -> the metric of its outputs (see `sensitivity.weights_of`)
        self.peaks = {block: torch.zeros(width // block, device=device) for block in PEAK_BLOCKS
                      if peaks and width % block == 0}     # block -> Σ (its largest |x|)², each token with its weight
        self.held_out: Tensor | None = None     # (rows, d_in) inputs that the Gram has not seen, each times √ its weight
        self._diagonal: Tensor | None = None
        self._factors: dict[tuple[float, str], Factor] = {}
        self._making = threading.Lock()         # linears that share a Gram may be edited by several threads

    @counted("Grams")
    def add(self, inputs: Tensor, weights: Tensor | None = None, original: Tensor | None = None) -> None:
        """Add the inputs of some tokens, (..., d_in), with their weights (tokens,) and the original's inputs."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        weighted = rows if weights is None else rows * weights.to(rows)[:, None]
        self.matrix.addmm_(weighted.mT, rows)
        for block, sums in self.peaks.items():
            largest = rows.reshape(len(rows), -1, block).abs().amax(-1).square()
            sums.add_(largest.sum(0) if weights is None else weights.to(rows) @ largest)
        if self.lag is not None:
            assert original is not None
            self.lag.addmm_((original.reshape(rows.shape) - rows).mT, weighted)
        elif self.follower is not None:
            assert original is not None
            assert self.moved is not None
            self.moved.addmm_(self.follower @ (original.reshape(rows.shape) - rows).mT, weighted)
        self.tokens += len(rows)

    def hold_out(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Keep the inputs of some tokens, (..., d_in), to judge edits by, at most HELD_OUT of them; they are not added."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        room = HELD_OUT - (0 if self.held_out is None else len(self.held_out))
        rows = (rows if weights is None else rows * weights.to(rows).sqrt()[:, None])[:room].clone()
        self.held_out = rows if self.held_out is None else torch.cat([self.held_out, rows])

    def error_held_out(self, errors: Tensor) -> float:
        """Σ (errors·x)² over the inputs x that were held out, each with its weight; errors (d_out, d_in)."""
        assert self.held_out is not None
        return float((self.held_out @ errors.mT).square().sum())

    @property
    def matrix(self) -> Tensor:
        """H itself, (d_in, d_in); only before a factor has taken its memory."""
        assert self._matrix is not None, "a factor has taken the Gram's memory"
        return self._matrix

    @counted("factors")
    def followed(self, weight: Tensor, damp: float, visit: str, *, last: bool = False) -> Tensor:
        """What to add to a weight W, (d_out, d_in), so that its outputs on today's inputs are those on the original's.

        W·(lag)·(H + damping)⁻¹: the least-squares answer (arXiv:2504.02692, eq. 5), by the factor made before. A few rows
        are solved at a time, to spare memory. With `last` the answer takes the memory of what a `follower` moved: it is not
        asked for again.
        """
        factor = self._factors[damp, visit]
        answer = self.moved if self.moved is not None and last else torch.empty_like(weight)
        for first in range(0, len(weight), ROWS_SOLVED):
            rows = slice(first, first + ROWS_SOLVED)
            if self.moved is not None:
                answer[rows] = factor.solve(self.moved[rows])
            else:
                assert self.lag is not None
                answer[rows] = factor.solve(weight[rows] @ self.lag)
        if last:
            self.moved = None
        return answer

    @property
    def width(self) -> int:
        """d_in."""
        return len(self.diagonal)

    @property
    def diagonal(self) -> Tensor:
        """Sums of squares of every input, (d_in,)."""
        if self._diagonal is None:
            self._diagonal = self.matrix.diagonal().clone()
        return self._diagonal

    @property
    def norms(self) -> Tensor:
        """‖X_j‖₂ of every input j, (d_in,)."""
        return self.diagonal.sqrt()

    def times(self, columns: Tensor, damp: float = 0.0) -> Tensor:
        """(H + damp·mean(diag H)·I)·M for M (d_in, k): the same whether the matrix or only a factor of it is left."""
        damping = damp * float(self.diagonal.mean())
        if self._matrix is not None:
            product = self._matrix @ columns
        else:
            factor = next(iter(self._factors.values()))
            product, damping = factor.times(columns), damping - factor.damping
        return product if damping == 0.0 else product.add_(columns, alpha=damping)

    @counted("factors")
    def factor(self, damp: float, visit: str, order_of: Callable[[Tensor], Tensor], *, last: bool = False) -> Factor:
        """The factor of H + damp·mean(diag H)·I; computed once for each damp and kind of order.

        `visit` names the kind of order and `order_of` makes it from the Gram's diagonal. With `last` the factor takes the
        matrix's memory: no other factor can be made afterwards. Raises NumericsError where it is not positive definite.
        """
        key = (damp, visit)
        with self._making:
            if key not in self._factors:
                order, matrix = order_of(self.diagonal), self.matrix
                damping = damp * float(self.diagonal.mean()) or 1.0         # as `reversed_factor` has it
                if last:
                    self._matrix = None
                self._factors[key] = Factor(reversed_factor(matrix, order, damp, overwrite=last), order, damping)
            return self._factors[key]
