"""Next-token losses of any text, layer by layer, and the divergence of two checkpoints; logits are never stored."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tsotsallm.checkpoint.view import View
from tsotsallm.errors import CheckpointError, NumericsError
from tsotsallm.machine import release_memory
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.frame import Frame, Load, load_final_norm
from tsotsallm.streaming.head import HeadPiece, head_pieces
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.sweep import Tick, embed_corpus, silent
from tsotsallm.timing import counted

HEAD_TOKENS = 256
MOST_NATS = 700.0
"""The largest mean loss whose perplexity a float64 can hold."""


@torch.no_grad()
def final_states(view: View, corpus: Corpus, path: Path, device: torch.device, tick: Tick = silent,
                 load: Load | None = None) -> HiddenStates:
    """Run a corpus through all layers and the final norm; the states (tokens, hidden), float32, go to a file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    states = HiddenStates(path, [len(window) for window in corpus.windows], view.spec.hidden)
    embed_corpus(view, corpus, states)
    frame = Frame(view.spec, device)
    for index in range(view.spec.layers):
        if load is None:
            frame.load(index, view.layer(index))
        else:
            load(frame, index)
        for batch in states.batches():
            states.write(batch, frame(states.read(batch)))
        release_memory()
        tick("scoring", (index + 1) / view.spec.layers)
    frame.clear()
    _normalise(view, [states], device)
    return states


def _normalise(view: View, files: Sequence[HiddenStates], device: torch.device) -> None:
    norm = load_final_norm(view, device)
    for states in files:
        for batch in states.batches():
            states.write(batch, norm(states.read(batch).to(device)))


class Predictions:
    """Which rows of the final states predict which tokens: all rows but the last of every window.

    rows, targets  (predictions,) int64
    """

    def __init__(self, corpus: Corpus) -> None:
        rows, targets, start = [], [], 0
        for window in corpus.windows:
            rows.append(torch.arange(start, start + len(window) - 1))
            targets.append(window[1:])
            start += len(window)
        self.rows, self.targets = torch.cat(rows), torch.cat(targets)

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self) -> list[slice]:
        """Slices of at most 256 predictions that the head processes at a time."""
        return [slice(first, first + HEAD_TOKENS) for first in range(0, len(self.rows), HEAD_TOKENS)]


def read_rows(states: HiddenStates, rows: Tensor) -> Tensor:
    """Rows of a file of states, (rows, width); `rows` rises, with small gaps between windows."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    flat = HiddenStates(states.path, [first, last - first] if first else [last], states.width)
    return flat.read([1 if first else 0])[0][rows - first]


class HeadTally:
    """Accumulates losses, and with `top` the most likely tokens, while the head is applied in pieces; all in float64."""

    def __init__(self, targets: Tensor, *, top: bool = False) -> None:
        self.targets = targets
        self.log_normaliser = torch.full((len(targets),), -math.inf, dtype=torch.float64)
        self.target_logit = torch.zeros(len(targets), dtype=torch.float64)
        self.best = torch.full((len(targets),), -math.inf, dtype=torch.float64) if top else None
        self.top = torch.zeros(len(targets), dtype=torch.int64)

    def add(self, block: slice, logits: Tensor, first: int) -> None:
        """Add the logits (predictions, tokens) of a block's predictions for the tokens from `first` on."""
        self.log_normaliser[block] = torch.logaddexp(self.log_normaliser[block], logits.logsumexp(-1).double().cpu())
        targets = self.targets[block]
        inside = (targets >= first) & (targets < first + logits.shape[1])
        picked = logits[inside.to(logits.device)].gather(1, (targets[inside] - first).to(logits.device)[:, None])
        self.target_logit[block][inside] = picked[:, 0].double().cpu()
        if self.best is not None:
            value, place = (tensor.cpu() for tensor in logits.max(-1))
            better = value > self.best[block]
            self.top[block] = torch.where(better, place + first, self.top[block])
            self.best[block] = torch.where(better, value.double(), self.best[block])

    @property
    def losses(self) -> Tensor:
        """−log p of every target in nats, (predictions,) float64."""
        return self.log_normaliser - self.target_logit


@counted("head and loss")
@torch.no_grad()
def head_tallies(view: View, files: Sequence[HiddenStates], corpus: Corpus, device: torch.device) -> list[HeadTally]:
    """Apply the head to the final states of a corpus in several files; returns one tally for each file."""
    predictions = Predictions(corpus)
    tallies = [HeadTally(predictions.targets) for _ in files]
    for piece in head_pieces(view, device):
        for tally, states in zip(tallies, files, strict=True):
            for block in predictions.blocks():
                tally.add(block, piece.logits(read_rows(states, predictions.rows[block]).to(device)), piece.first)
    return tallies


def token_losses(view: View, files: Sequence[HiddenStates], corpus: Corpus, device: torch.device) -> Tensor:
    """−log p of every predicted token in nats, (files, predictions) float64; NumericsError where it is not finite."""
    losses = torch.stack([tally.losses for tally in head_tallies(view, files, corpus, device)])
    require_finite(losses, view)
    return losses


def require_finite(losses: Tensor, view: View) -> None:
    """Raise NumericsError where losses are not finite, or too large for a perplexity."""
    if not bool(torch.isfinite(losses).all()) or float(losses.mean()) > MOST_NATS:
        raise NumericsError(f"{view.checkpoint.directory}: the model gives losses that are not finite on this text; "
                            "its weights are damaged or far out of range")


@dataclass(frozen=True)
class Divergence:
    """For each predicted token, float64: both models' losses and KL(reference ‖ model) in nats, whether the top tokens
    agree (bool), and by how much the reference's probability of its top token is above the model's."""

    losses: Tensor
    reference_losses: Tensor
    kl: Tensor
    same_top: Tensor
    top_difference: Tensor


@counted("head and loss")
@torch.no_grad()
def divergence(view: View, states: HiddenStates, reference: View, reference_states: HiddenStates, corpus: Corpus,
               device: torch.device) -> Divergence:
    """Compare two models token by token over the full vocabulary, head piece by head piece.

    KL = Σ p·(z_p − z_q) − (log Z_p − log Z_q), with logits z and their normalisers Z. Raises CheckpointError where the
    vocabularies differ, NumericsError where losses are not finite.
    """
    if view.spec.vocabulary != reference.spec.vocabulary:
        raise CheckpointError(f"{view.checkpoint.directory} has {view.spec.vocabulary} tokens and "
                              f"{reference.checkpoint.directory} {reference.spec.vocabulary}: their divergence is not "
                              "defined; compare bits per byte instead")
    def of_model(piece: HeadPiece) -> Callable[[Tensor], Tensor]:
        return lambda rows: piece.logits(read_rows(states, rows).to(device))

    pieces = ((own, of_model(piece)) for piece, own in zip(head_pieces(view, device), head_pieces(reference, device),
                                                          strict=True))
    found = compared(Predictions(corpus), pieces, lambda rows: read_rows(reference_states, rows).to(device))
    require_finite(found.losses, view)
    require_finite(found.reference_losses, reference)
    return found


@torch.no_grad()
def compared(predictions: Predictions, pieces: Iterable[tuple[HeadPiece, Callable[[Tensor], Tensor]]],
             read: Callable[[Tensor], Tensor]) -> Divergence:
    """The divergence of a model from a reference, piece by piece of the reference's head; see `divergence`.

    Each piece comes with what gives the model's logits of its tokens, or its log-probabilities, for some rows; `read`
    returns rows of the reference's final states.
    """
    count = len(predictions)
    model, original = tallies = [HeadTally(predictions.targets, top=True) for _ in range(2)]
    weighted = torch.zeros(count, dtype=torch.float64)          # Σ exp(z_p − peak)·(z_p − z_q)
    peak = torch.full((count,), -math.inf, dtype=torch.float64)
    at_top = torch.zeros(count, dtype=torch.float64)            # z_q of the reference's top token
    for piece, of_model in pieces:
        for block in predictions.blocks():
            rows = predictions.rows[block]
            z_q, z_p = of_model(rows), piece.logits(read(rows))
            for tally, logits in zip(tallies, (z_q, z_p), strict=True):
                tally.add(block, logits, piece.first)
            value, place = z_p.max(-1)
            highest = torch.maximum(peak[block], value.double().cpu())
            there = z_q.gather(1, place[:, None])[:, 0].double().cpu()
            at_top[block] = torch.where(highest > peak[block], there, at_top[block])
            here = ((z_p - highest.to(z_p)[:, None]).exp() * (z_p - z_q)).sum(-1).double().cpu()
            weighted[block] = weighted[block] * (peak[block] - highest).exp() + here
            peak[block] = highest
    kl = weighted * (peak - original.log_normaliser).exp() - (original.log_normaliser - model.log_normaliser)
    top_difference = (peak - original.log_normaliser).exp() - (at_top - model.log_normaliser).exp()
    return Divergence(model.losses, original.losses, kl.clamp(min=0), model.top == original.top, top_difference)


@torch.no_grad()
def leave_one_out_losses(view: View, corpus: Corpus, candidates: Sequence[int], scratch: Path, device: torch.device,
                         tick: Tick = silent) -> tuple[float, dict[int, float]]:
    """Mean loss (nats per token) of the model, and of the model without each candidate layer, in one pass.

    The hidden states branch at every candidate: its inputs become those of the layer after it. The prefix is computed
    once, and each layer is loaded once. A file of states is named by its branch and the layer that it enters, and gets
    that name when it is complete: called again on the same `scratch` after a kill, the pass resumes from there. The
    last states stay in `scratch`, which the caller deletes.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    lengths, layers = [len(window) for window in corpus.windows], view.spec.layers

    def entering(layer: int, without: int | None = None) -> HiddenStates:
        branch = "whole" if without is None else f"without-{without:04d}"
        return HiddenStates(scratch / f"{branch}-enters-{layer:04d}.f32", lengths, view.spec.hidden)

    def advance(layer: int, through: Callable[[Tensor], Tensor]) -> None:
        for branch in (None, *(index for index in candidates if index < layer)):
            inputs, outputs = entering(layer, branch), entering(layer + 1, branch)
            if not inputs.exists():
                continue
            if not outputs.exists():
                with outputs.drafted() as draft:
                    for batch in inputs.batches():
                        draft.write(batch, through(inputs.read(batch).to(device)))
            if branch is None and layer in candidates:
                os.replace(inputs.path, entering(layer + 1, layer).path)
            else:
                inputs.remove()

    if not any(entering(layer).exists() for layer in range(layers + 2)):
        with entering(0).drafted() as draft:
            embed_corpus(view, corpus, draft)
    frame = Frame(view.spec, device)
    for index in range(layers):
        if any(scratch.glob(f"*-enters-{index:04d}.f32")):
            frame.load(index, view.layer(index))
            advance(index, frame)
        tick("leaving one out", (index + 1) / layers)
    frame.clear()
    advance(layers, load_final_norm(view, device))
    files = [entering(layers + 1, branch) for branch in (None, *candidates)]
    means = token_losses(view, files, corpus, device).mean(-1).tolist()
    return means[0], dict(zip(candidates, means[1:], strict=True))
