"""From final hidden states to logits, a piece of the head at a time; logits of the whole vocabulary are never stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.view import View

PIECE_ROWS = 4096


@dataclass(frozen=True)
class HeadPiece:
    """Neighbouring rows of the output head, and what the family does to their products.

    first    the first token
    weights  (tokens, hidden) float32
    divisor  logits are divided by it
    cap      the c with which logits z become c·tanh(z / c); None where they stay as they are
    """

    first: int
    weights: Tensor
    divisor: float = 1.0
    cap: float | None = None

    def __len__(self) -> int:
        return len(self.weights)

    def logits(self, states: Tensor) -> Tensor:
        """Logits of the piece's tokens, (..., hidden) -> (..., tokens)."""
        found = states @ self.weights.mT
        if self.divisor != 1:
            found = found / self.divisor
        return found if self.cap is None else self.cap * torch.tanh(found / self.cap)

    def backward(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """∂/∂states, (..., hidden), of what has this gradient by these logits, both (..., tokens)."""
        if self.cap is not None:
            gradient = gradient * (1 - (logits / self.cap).square())
        if self.divisor != 1:
            gradient = gradient / self.divisor
        return gradient @ self.weights


Pieces = Callable[[], Iterator[HeadPiece]]


def pieces_of(spec: ModelSpec, rows: Callable[[int, int], Tensor], most: int = PIECE_ROWS) -> Iterator[HeadPiece]:
    """Yield a model's head in pieces of at most `most` tokens; `rows` gives those from a first to before a last."""
    for first in range(0, spec.vocabulary, most):
        yield HeadPiece(first, rows(first, min(first + most, spec.vocabulary)), spec.logit_divisor, spec.logit_cap)


def head_pieces(view: View, device: torch.device, most: int = PIECE_ROWS) -> Iterator[HeadPiece]:
    """Yield the output head of a checkpoint in pieces of at most `most` tokens, on a device."""
    name = view.checkpoint.head_name
    return pieces_of(view.spec, lambda first, last: view.checkpoint.rows(name, first, last).to(device), most)
