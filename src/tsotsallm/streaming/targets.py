"""Targets of the final states, and the loss and its gradient with the output head applied in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.head import Pieces
from tsotsallm.streaming.score import HEAD_TOKENS


@dataclass(frozen=True)
class Targets:
    """A distribution over k tokens for every row of the final states that is learned.

    rows         (n,) numbers of the rows, rising
    tokens       (n, k) the tokens
    shares       (n, k) their probabilities; each row sums to one
    weights      (n,) the weight of each row in the loss
    temperature  divides the model's logits; the loss is multiplied by its square (arXiv:1503.02531, section 2)
    """

    rows: Tensor
    tokens: Tensor
    shares: Tensor
    weights: Tensor
    temperature: float = 1.0

    @classmethod
    def next_tokens(cls, corpus: Corpus) -> Targets:
        """Predict the next token; the loss is the mean over all tokens that `learned` marks."""
        rows, tokens, start = [], [], 0
        for index, window in enumerate(corpus.windows):
            every = torch.ones(len(window) - 1, dtype=torch.bool)
            learned = every if corpus.learned is None else corpus.learned[index][1:]
            rows.append(start + learned.nonzero()[:, 0])
            tokens.append(window[1:][learned])
            start += len(window)
        learned_rows = torch.cat(rows)
        count = len(learned_rows)
        return cls(learned_rows, torch.cat(tokens)[:, None], torch.ones(count, 1), torch.full((count,), 1 / max(count, 1)))

    def places_of(self, corpus: Corpus, windows: Sequence[int]) -> Tensor:
        """Places of the targets that are in some windows, window by window in the given order, (m,)."""
        starts = corpus.starts
        found = [torch.searchsorted(self.rows, torch.tensor([starts[place], starts[place + 1]])) for place in windows]
        return torch.cat([torch.arange(int(first), int(last)) for first, last in found])

    def of_windows(self, corpus: Corpus, windows: Sequence[int]) -> Targets:
        """The targets in some windows, renumbered for a corpus of only these windows in the given order."""
        places, starts = self.places_of(corpus, windows), corpus.starts
        moved, new = [], 0
        for place in windows:
            length = starts[place + 1] - starts[place]
            rows = self.rows[(self.rows >= starts[place]) & (self.rows < starts[place + 1])]
            moved.append(rows - starts[place] + new)
            new += length
        return Targets(torch.cat(moved), self.tokens[places], self.shares[places], self.weights[places], self.temperature)

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self) -> list[slice]:
        """Slices of at most 1024 targets that the head processes at a time."""
        return [slice(first, first + HEAD_TOKENS) for first in range(0, len(self.rows), HEAD_TOKENS)]

    def inside(self, block: slice, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The targets of a block among tokens [first, first + count): row in the block, token − first, share; each (m,)."""
        tokens = self.tokens[block]
        where = ((tokens >= first) & (tokens < first + count)).nonzero(as_tuple=True)
        return where[0], tokens[where] - first, self.shares[block][where]


@torch.no_grad()
def head_losses(read: Callable[[Tensor], Tensor], pieces: Pieces, targets: Targets) -> tuple[Tensor, Tensor]:
    """(loss of every learned row, log of its normaliser), each (n,) float64; `read` returns rows of the final states.

    The loss of a row is −Σ share·log p of its targets, times the temperature squared.
    """
    log_normaliser = torch.full((len(targets),), -math.inf, dtype=torch.float64)
    expected = torch.zeros(len(targets), dtype=torch.float64)          # Σ share·logit
    for piece in pieces():
        for block in targets.blocks():
            logits = piece.logits(read(targets.rows[block])) / targets.temperature
            log_normaliser[block] = torch.logaddexp(log_normaliser[block], logits.logsumexp(-1).double().cpu())
            row, place, share = targets.inside(block, piece.first, len(piece))
            logits_of_targets = logits[row.to(logits.device), place.to(logits.device)].cpu()
            expected[block].index_add_(0, row, (logits_of_targets * share).double())
    return targets.temperature ** 2 * (log_normaliser - expected), log_normaliser


@torch.no_grad()
def head_gradient(read: Callable[[Tensor], Tensor], add: Callable[[Tensor, Tensor], None], pieces: Pieces, targets: Targets,
                  log_normaliser: Tensor) -> None:
    """Pass ∂(Σ weight·loss)/∂(final states) to `add(rows, values)`, once for each piece of the head and block of targets."""
    for piece in pieces():
        for block in targets.blocks():
            logits = piece.logits(read(targets.rows[block]))
            off = (logits / targets.temperature - log_normaliser[block].to(logits)[:, None]).exp()
            row, place, share = (tensor.to(logits.device) for tensor in targets.inside(block, piece.first, len(piece)))
            off.index_put_((row, place), -share.to(off), accumulate=True)
            off *= (targets.weights[block] * targets.temperature).to(off)[:, None]
            add(targets.rows[block], piece.backward(off, logits).cpu())
