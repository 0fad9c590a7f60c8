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
from tsotsallm.timing import counted


@dataclass(frozen=True)
class Targets:
    """A distribution over k tokens for every row of the final states that is learned.

    rows         (n,) numbers of the rows, rising
    tokens       (n, k) the tokens
    shares       (n, k) their probabilities; each row sums to one, or to less where the rest counts
    weights      (n,) the weight of each row in the loss
    temperature  divides the model's logits; the loss is multiplied by its square (arXiv:1503.02531, section 2)
    whole        whether all other tokens together are one more, with what the shares leave; the loss is then the divergence
                 from that distribution, which is never above that from the whole one
    """

    rows: Tensor
    tokens: Tensor
    shares: Tensor
    weights: Tensor
    temperature: float = 1.0
    whole: bool = False

    @property
    def rest(self) -> Tensor:
        """The probability of all other tokens together, (n,) float64; zero unless it counts."""
        left = 1 - self.shares.double().sum(-1) if self.whole else torch.zeros(len(self), dtype=torch.float64)
        return left.clamp(min=0)

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
        return Targets(torch.cat(moved), self.tokens[places], self.shares[places], self.weights[places], self.temperature,
                       self.whole)

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self) -> list[slice]:
        """Slices of at most 1024 targets that the head processes at a time."""
        return [slice(first, first + HEAD_TOKENS) for first in range(0, len(self.rows), HEAD_TOKENS)]

    def inside(self, block: slice, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The targets of a block among tokens [first, first + count): row in the block, token − first, share; each (m,)."""
        where = self.among(block, first, count).nonzero(as_tuple=True)
        return where[0], self.tokens[block][where] - first, self.shares[block][where]

    def among(self, block: slice, first: int, count: int) -> Tensor:
        """Which targets of a block are among tokens [first, first + count), (rows of the block, k) bool."""
        tokens = self.tokens[block]
        return (tokens >= first) & (tokens < first + count)


@dataclass(frozen=True)
class HeadSums:
    """What the gradient of the losses needs of all pieces of the head together.

    log_normaliser  (n,) float64
    log_rest        (n,) float64: the log of the probability of all tokens that are no targets, where they count
    """

    log_normaliser: Tensor
    log_rest: Tensor | None = None


@counted("head and loss")
@torch.no_grad()
def head_losses(read: Callable[[Tensor], Tensor], pieces: Pieces, targets: Targets) -> tuple[Tensor, HeadSums]:
    """(loss of every learned row, (n,) float64, what its gradient needs); `read` returns rows of the final states.

    The loss of a row is −Σ share·log p of its targets, times the temperature squared; where the rest counts, it is
    Σ share·log(share / p) over the targets and all other tokens as one.
    """
    log_normaliser = torch.full((len(targets),), -math.inf, dtype=torch.float64)
    expected = torch.zeros(len(targets), dtype=torch.float64)          # Σ share·logit
    logits_at = torch.zeros(targets.tokens.shape, dtype=torch.float64) if targets.whole else None
    for piece in pieces():
        for block in targets.blocks():
            logits = piece.logits(read(targets.rows[block])) / targets.temperature
            log_normaliser[block] = torch.logaddexp(log_normaliser[block], logits.logsumexp(-1).double().cpu())
            row, place, share = targets.inside(block, piece.first, len(piece))
            logits_of_targets = logits[row.to(logits.device), place.to(logits.device)].cpu()
            expected[block].index_add_(0, row, (logits_of_targets * share).double())
            if logits_at is not None:
                logits_at[block][targets.among(block, piece.first, len(piece))] = logits_of_targets.double()
    if logits_at is None:
        return targets.temperature ** 2 * (log_normaliser - expected), HeadSums(log_normaliser)
    shares, rest = targets.shares.double(), targets.rest
    known = (logits_at - log_normaliser[:, None]).exp().sum(-1)
    log_rest = torch.log1p(-known.clamp(max=1 - 1e-12))
    losses = (torch.special.xlogy(shares, shares).sum(-1) - expected + shares.sum(-1) * log_normaliser
              + torch.special.xlogy(rest, rest) - rest * log_rest)
    return targets.temperature ** 2 * losses, HeadSums(log_normaliser, log_rest)


@counted("head and loss")
@torch.no_grad()
def head_gradient(read: Callable[[Tensor], Tensor], add: Callable[[Tensor, Tensor], None], pieces: Pieces, targets: Targets,
                  sums: HeadSums) -> None:
    """Pass ∂(Σ weight·loss)/∂(final states) to `add(rows, values)`, once for each piece of the head and block of targets.

    The gradient by a logit is p − share, with the rest's share spread over the other tokens as p is.
    """
    rest = None if sums.log_rest is None else (targets.rest * (-sums.log_rest).exp())
    for piece in pieces():
        for block in targets.blocks():
            logits = piece.logits(read(targets.rows[block]))
            off = (logits / targets.temperature - sums.log_normaliser[block].to(logits)[:, None]).exp()
            row, place, share = (tensor.to(logits.device) for tensor in targets.inside(block, piece.first, len(piece)))
            if rest is None:
                off.index_put_((row, place), -share.to(off), accumulate=True)
            else:
                known = off[row, place] - share.to(off)
                off *= 1 - rest[block].to(off)[:, None]
                off[row, place] = known
            off *= (targets.weights[block] * targets.temperature).to(off)[:, None]
            add(targets.rows[block], piece.backward(off, logits).cpu())
