"""Embeddings and head on a grid: row by row, in the metric of what the head reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tsotsallm.checkpoint.spec import EMBEDDING, HEAD
from tsotsallm.checkpoint.view import View
from tsotsallm.numerics.ggml import Blocks, GgmlGrid, encode
from tsotsallm.numerics.rounding import block_order, round_plainly, round_to_blocks
from tsotsallm.stages.allocation import ACTIVATIONS, activation_error
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.frame import load_final_norm
from tsotsallm.streaming.head import head_pieces
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.statistics import Gram
from tsotsallm.streaming.sweep import Tick

CPU = torch.device("cpu")
ROWS_AT_ONCE = 4096
VARIANCE_TOKENS = 2048
DAMP = 0.1
"""Raises the head's Gram by more than a linear's: tied embeddings are looked up too, where every column counts alike."""


def end_modules(view: View) -> list[str]:
    """The matrices that are no linear of a layer: embeddings, and the head unless it is the same."""
    names = [EMBEDDING] if view.spec.tied else [EMBEDDING, HEAD]
    return [name.removesuffix(".weight") for name in names]


@torch.no_grad()
def head_gram(view: View, states: HiddenStates) -> Gram:
    """The Gram of what the head reads, from the outputs of the last layer; on the CPU, where the rows of the head are."""
    norm, gram = load_final_norm(view, CPU), Gram(view.spec.hidden, CPU, peaks=True)
    for batch in states.batches():
        gram.add(norm(states.read(batch)))
    return gram


@torch.no_grad()
def token_variances(view: View, states: HiddenStates) -> Tensor:
    """The mean of p·(1 − p) for every token of the vocabulary, (vocabulary,), p as the model says it, over at most
    VARIANCE_TOKENS places of the corpus."""
    norm, every = load_final_norm(view, CPU), max(1, states.tokens // VARIANCE_TOKENS)
    rows = torch.cat([norm(states.read(batch)).reshape(-1, view.spec.hidden)[::every]
                      for batch in states.batches()])
    whole = torch.full((len(rows),), float("-inf"))
    for piece in head_pieces(view, CPU):
        whole = torch.logaddexp(whole, piece.logits(rows).logsumexp(-1))
    found = torch.empty(view.spec.vocabulary)
    for piece in head_pieces(view, CPU):
        shares = (piece.logits(rows) - whole[:, None]).exp()
        found[piece.first:piece.first + len(piece)] = (shares * (1 - shares)).mean(0)
    return found


def _reads_head(view: View, module: str) -> bool:
    return view.spec.tied or f"{module}.weight" == HEAD


def rounded(view: View, module: str, first: int, last: int, grid: GgmlGrid, gram: Gram | None, passes: int) -> Blocks:
    """Rows [first, last) of embeddings or head on a grid."""
    rows = view.checkpoint.rows(f"{module}.weight", first, last)
    if gram is None or not _reads_head(view, module):
        return round_plainly(rows, grid)
    layout = grid.layout
    factor = gram.factor(DAMP, f"blocks of {layout.block} in parts of {layout.part}",
                         lambda diagonal: block_order(diagonal, grid))
    return round_to_blocks(rows, factor.upper, factor.order, grid, passes=passes)


def packed_ends(view: View, grids: Mapping[str, GgmlGrid], gram: Gram | None, passes: int, tick: Tick) -> dict[str, Tensor]:
    """The blocks of every matrix that `grids` names, by the name that they are stored under."""
    found = {}
    for module, grid in grids.items():
        parts = []
        for first in range(0, view.spec.vocabulary, ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, view.spec.vocabulary)
            parts.append(torch.from_numpy(encode(rounded(view, module, first, last, grid, gram, passes))))
            tick(f"rounding {module.rpartition('.')[2]}", last / view.spec.vocabulary)
        found[f"{module}.weight_blocks"] = torch.cat(parts)
    return found


def end_losses(view: View, corpus: Corpus, states: HiddenStates, candidates: Mapping[str, list[GgmlGrid]],
               squares: float) -> dict[str, list[float]]:
    """What the loss is expected to rise by, in nats a token, with each candidate grid of each matrix, as notes of a probe.

    A wrong logit of a token costs ½·p·(1 − p) of its square (the second derivative of the loss); `states` are the outputs of
    the last layer. A wrong embedding costs ½·squares of its square for every time
    that it is looked up; `squares` is the mean square of the loss's gradient by a number of the first layer's inputs,
    times the tokens. Both follow the family's scaling of embeddings and logits; a cap of logits is not counted.
    """
    spec = view.spec
    squares, per_logit = squares * spec.embedding_scale ** 2, 0.5 / spec.logit_divisor ** 2
    vocabulary, tokens = view.spec.vocabulary, corpus.tokens
    counts = torch.bincount(torch.cat(corpus.windows), minlength=vocabulary).float()
    gram, variances = head_gram(view, states), token_variances(view, states)
    metric = gram.matrix / tokens
    losses: dict[str, list[float]] = {f"{module}{kind}": [0.0] * len(grids) for module, grids in candidates.items()
                                      for kind in ("", ACTIVATIONS)}
    for module, grids in candidates.items():
        for first in range(0, vocabulary, ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, vocabulary)
            rows = view.checkpoint.rows(f"{module}.weight", first, last)
            for place, grid in enumerate(grids):
                errors = rows - rounded(view, module, first, last, grid, gram, 0).dequantise()
                cost = torch.zeros(())
                if _reads_head(view, module):
                    of_logits = per_logit * variances[first:last]
                    cost = cost + ((errors @ metric * errors).sum(1) * of_logits).sum()
                    inputs = activation_error(rows, gram, grid) / tokens
                    losses[f"{module}{ACTIVATIONS}"][place] += float((inputs * of_logits).sum())
                if f"{module}.weight" == EMBEDDING:
                    cost = cost + 0.5 * squares * (errors.square().sum(1) * counts[first:last]).sum()
                losses[module][place] += float(cost)
    return losses
