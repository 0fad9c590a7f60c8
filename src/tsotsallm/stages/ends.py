"""Embeddings and head on a grid: row by row, in the metric of what the head reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tsotsallm.checkpoint.spec import EMBEDDING, HEAD
from tsotsallm.checkpoint.view import View
from tsotsallm.numerics.ggml import Blocks, GgmlGrid, encode
from tsotsallm.numerics.rounding import block_order, round_plainly, round_to_blocks
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.frame import load_final_norm
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.statistics import Gram
from tsotsallm.streaming.sweep import Tick

ROWS_AT_ONCE = 4096
DAMP = 0.1
"""Raises the head's Gram by more than a linear's: tied embeddings are looked up too, where every column counts alike."""


def end_modules(view: View) -> list[str]:
    """The matrices that are no linear of a layer: embeddings, and the head unless it is the same."""
    names = [EMBEDDING] if view.spec.tied else [EMBEDDING, HEAD]
    return [name.removesuffix(".weight") for name in names]


@torch.no_grad()
def head_gram(view: View, states: HiddenStates, device: torch.device) -> Gram:
    """The Gram of what the head reads, from the outputs of the last layer."""
    norm, gram = load_final_norm(view, device), Gram(view.spec.hidden, device)
    for batch in states.batches():
        gram.add(norm(states.read(batch).to(device)))
    return gram


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


def end_losses(view: View, corpus: Corpus, gram: Gram, candidates: Mapping[str, list[GgmlGrid]],
               squares: float) -> dict[str, list[float]]:
    """What the loss is expected to rise by, in nats a token, with each candidate grid of each matrix.

    A wrong logit of a token costs ½·p·(1 − p) of its square (the second derivative of the loss); p is taken as the
    token's share of the corpus, one added to each count. A wrong embedding costs ½·squares of its square for every time
    that it is looked up; `squares` is the mean square of the loss's gradient by a number of the first layer's inputs,
    times the tokens. Both follow the family's scaling of embeddings and logits; a cap of logits is not counted.
    """
    spec = view.spec
    squares, per_logit = squares * spec.embedding_scale ** 2, 0.5 / spec.logit_divisor ** 2
    vocabulary, tokens = view.spec.vocabulary, corpus.tokens
    counts = torch.bincount(torch.cat(corpus.windows), minlength=vocabulary).float()
    shares = (counts + 1) / (tokens + vocabulary)
    metric = gram.matrix / tokens
    losses: dict[str, list[float]] = {module: [0.0] * len(grids) for module, grids in candidates.items()}
    for module, grids in candidates.items():
        for first in range(0, vocabulary, ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, vocabulary)
            rows = view.checkpoint.rows(f"{module}.weight", first, last)
            for place, grid in enumerate(grids):
                errors = rows - rounded(view, module, first, last, grid, gram, 0).dequantise()
                cost = torch.zeros(())
                if _reads_head(view, module):
                    part = shares[first:last]
                    cost = cost + per_logit * ((errors @ metric * errors).sum(1) * part * (1 - part)).sum()
                if f"{module}.weight" == EMBEDDING:
                    cost = cost + 0.5 * squares * (errors.square().sum(1) * counts[first:last]).sum()
                losses[module][place] += float(cost)
    return losses
