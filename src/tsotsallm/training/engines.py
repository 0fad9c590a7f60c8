"""Two ways to compute the same gradients: with the whole model in memory, or one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tsotsallm.checkpoint.view import View
from tsotsallm.engine.resident import resident
from tsotsallm.streaming.backward import backward_sweep
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.frame import Frame
from tsotsallm.streaming.head import HeadPiece, head_pieces, pieces_of
from tsotsallm.streaming.score import final_states, read_rows
from tsotsallm.streaming.targets import Targets, head_gradient, head_losses
from tsotsallm.timing import counted, part
from tsotsallm.training.trainee import Trained

MICRO_TOKENS = 2048


class Engine(Protocol):
    """Computes losses of a model with trained factors, and their gradients, on a device."""

    device: torch.device

    def gradients(self, batch: Corpus, targets: Targets, step: int) -> float:
        """Add ∂loss/∂factors to the factors' `.grad`; returns the loss, Σ weight·loss over rows."""

    def losses(self, corpus: Corpus, targets: Targets) -> Tensor:
        """The loss of every learned row without dropout, (n,) float64."""


class ResidentEngine:
    """Keeps the whole model in memory; linears that are packed on disk stay packed."""

    def __init__(self, view: View, adapted: Trained, device: torch.device) -> None:
        self.adapted, self.device, self.spec = adapted, device, view.spec
        self.model = resident(view, device=str(device), keep_packed=True).requires_grad_(False)
        for index, layer in enumerate(self.model.model.layers):
            adapted.install(layer, index)

    def _pieces(self) -> Iterator[HeadPiece]:
        head = self.model.lm_head.weight
        return pieces_of(self.spec, lambda first, last: head[first:last])

    @counted("forward passes")
    def _states(self, corpus: Corpus) -> Tensor:
        """Final states (tokens, hidden) of windows in one batch, padded on the right, where nothing attends."""
        lengths = [len(window) for window in corpus.windows]
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for row, window in enumerate(corpus.windows):
            ids[row, :len(window)] = window
        hidden = self.model.model(ids.to(self.device), use_cache=False).last_hidden_state
        return torch.cat([hidden[row, :length] for row, length in enumerate(lengths)])

    def gradients(self, batch: Corpus, targets: Targets, step: int) -> float:
        """Add ∂loss/∂factors to the factors' `.grad`; returns the loss, Σ weight·loss over rows."""
        self.adapted.begin(step, active=True)
        total = 0.0
        for places in _micro_batches(batch):
            some = targets.of_windows(batch, places)
            if not len(some):
                continue
            with torch.enable_grad():
                states = self._states(batch.take(places))
            fixed, gradient = states.detach(), torch.zeros_like(states)
            read = fixed.__getitem__
            losses, log_normaliser = head_losses(read, self._pieces, some)
            head_gradient(read, _adder(gradient), self._pieces, some, log_normaliser)
            with part("backward passes"):
                torch.autograd.backward(states, gradient)
            total += float((losses * some.weights).sum())
        return total

    @torch.no_grad()
    def losses(self, corpus: Corpus, targets: Targets) -> Tensor:
        """The loss of every learned row without dropout, (n,) float64."""
        self.adapted.begin(0, active=False)
        all_losses = torch.zeros(len(targets), dtype=torch.float64)
        for places in _micro_batches(corpus):
            some = targets.of_windows(corpus, places)
            if len(some):
                states = self._states(corpus.take(places))
                losses, _ = head_losses(states.__getitem__, self._pieces, some)
                all_losses[targets.places_of(corpus, places)] = losses
        return all_losses


class StreamedEngine:
    """Keeps one layer in memory, with states and gradients on disk in `scratch`; every step reads the model twice."""

    def __init__(self, view: View, adapted: Trained, device: torch.device, scratch: Path) -> None:
        self.view, self.adapted, self.device, self.scratch = view, adapted, device, scratch
        self._undo: Callable[[], None] = _nothing

    def _load(self, frame: Frame, index: int) -> dict[str, Tensor]:
        self._undo()
        frame.load(index, self.view.layer(index))
        self._undo = self.adapted.install(frame.layer, index)
        self.adapted.again(index)
        return self.adapted.of_layer(index)

    def gradients(self, batch: Corpus, targets: Targets, step: int) -> float:
        """Add ∂loss/∂factors to the factors' `.grad`; returns the loss, Σ weight·loss over rows."""
        self.adapted.begin(step, active=True)
        losses: list[Tensor] = []
        for path in self.scratch.glob("*"):
            path.unlink()
        for _ in backward_sweep(self.view, batch, self.scratch, self.device, targets=targets, load=self._load,
                                on_losses=losses.append):
            pass
        self._undo()
        self._undo = _nothing
        return float((losses[0] * targets.weights).sum())

    def losses(self, corpus: Corpus, targets: Targets) -> Tensor:
        """The loss of every learned row without dropout, (n,) float64."""
        self.adapted.begin(0, active=False)
        states = final_states(self.view, corpus, self.scratch / "validation.f32", self.device, load=self._load)
        self._undo()
        self._undo = _nothing
        losses, _ = head_losses(lambda rows: read_rows(states, rows).to(self.device),
                                lambda: head_pieces(self.view, self.device), targets)
        states.remove()
        return losses


def _nothing() -> None:
    """Undo nothing: no layer has factors installed."""


def _adder(states: Tensor) -> Callable[[Tensor, Tensor], None]:
    def add(rows: Tensor, values: Tensor) -> None:
        states.index_add_(0, rows.to(states.device), values.to(states))
    return add


def _micro_batches(corpus: Corpus) -> Iterator[list[int]]:
    """Yield windows of similar lengths, at most 2048 tokens together with their padding."""
    order = sorted(range(len(corpus.windows)), key=lambda place: len(corpus.windows[place]))
    some: list[int] = []
    for place in order:
        if some and (len(some) + 1) * len(corpus.windows[place]) > MICRO_TOKENS:
            yield some
            some = []
        some.append(place)
    if some:
        yield some
