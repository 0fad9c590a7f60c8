"""The sweep from the last layer to the first: gradients of the loss with one layer in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tsotsallm.checkpoint.view import View
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.frame import Frame, Load, load_final_norm
from tsotsallm.streaming.head import HeadPiece, head_pieces
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.score import read_rows
from tsotsallm.streaming.sweep import Tick, embed_corpus, silent
from tsotsallm.streaming.targets import Targets, head_gradient, head_losses
from tsotsallm.timing import part


def all_weights(view: View) -> Load:
    """A loader that asks for the gradient of every tensor of a layer."""
    def load(frame: Frame, index: int) -> dict[str, Tensor]:
        frame.load(index, view.layer(index))
        frame.layer.requires_grad_(True)
        return dict(frame.layer.named_parameters())
    return load


Gradients = dict[str, tuple[Tensor, Tensor]]
"""Name -> (tensor, gradient of the loss with respect to it), both float32 of the tensor's shape."""


def backward_sweep(view: View, corpus: Corpus, scratch: Path, device: torch.device, tick: Tick = silent, *,
                   targets: Targets | None = None, load: Load | None = None,
                   on_losses: Callable[[Tensor], None] = lambda _losses: None) -> Iterator[tuple[int, Gradients]]:
    """Yield (index, gradients) of every layer, from the last to the first.

    The loss is the mean over next tokens, or that of `targets`; `load` decides which tensors get gradients (by default
    all weights); `on_losses` receives the losses of all targets, (n,) float64. The inputs of every layer are kept on disk;
    each layer is loaded again, recomputed and back-propagated. Files get their names when they are complete: called again
    on the same `scratch` after a kill, the sweep resumes at the interrupted layer and does not yield earlier ones again.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    load = load or all_weights(view)
    targets = targets or Targets.next_tokens(corpus)
    lengths = [len(window) for window in corpus.windows]
    layers = view.spec.layers
    inputs = [HiddenStates(scratch / f"inputs-{index:04d}.f32", lengths, view.spec.hidden)
              for index in range(layers + 1)]
    gradients = [states.like(scratch / f"gradient-{index:04d}.f32") for index, states in enumerate(inputs)]
    frame = Frame(view.spec, device)
    at = next((index for index in range(layers + 1) if gradients[index].exists()), None)
    if at is None:
        _inputs_of_all_layers(view, corpus, inputs, frame, load, tick)
        with gradients[layers].drafted() as draft:
            on_losses(_gradient_of_head(view, targets, inputs[layers], draft, device))
        at = layers
    for index in reversed(range(at)):
        wanted = load(frame, index)
        with torch.enable_grad(), gradients[index].drafted() as draft:
            for batch in inputs[index].batches():
                states = inputs[index].read(batch).to(device).requires_grad_()
                outputs, following = frame(states), gradients[index + 1].read(batch).to(device)
                with part("backward passes"):
                    torch.autograd.backward(outputs, following)
                assert states.grad is not None
                draft.write(batch, states.grad)
            gradients_of = {}
            for name, weight in wanted.items():
                assert weight.grad is not None
                gradients_of[name] = (weight.detach(), weight.grad)
            yield index, gradients_of      # the draft is complete only when the next layer is requested
            gradients_of.clear()
        gradients[index + 1].remove()
        inputs[index + 1].remove()
        tick("backward", (layers - index) / layers)
    frame.clear()
    inputs[0].remove()
    gradients[0].remove()


@torch.no_grad()
def _inputs_of_all_layers(view: View, corpus: Corpus, inputs: Sequence[HiddenStates], frame: Frame, load: Load,
                          tick: Tick) -> None:
    if not inputs[0].exists():
        with inputs[0].drafted() as draft:
            embed_corpus(view, corpus, draft)
    for index in range(view.spec.layers):
        if not inputs[index + 1].exists():
            load(frame, index)
            with inputs[index + 1].drafted() as draft:
                for batch in inputs[index].batches():
                    draft.write(batch, frame(inputs[index].read(batch)))
        tick("forward", (index + 1) / view.spec.layers)


def _gradient_of_head(view: View, targets: Targets, last: HiddenStates, gradient: HiddenStates,
                      device: torch.device) -> Tensor:
    """Write ∂loss/∂(output of the last layer), through head and final norm, to `gradient`; returns the losses, (n,)."""
    norm = load_final_norm(view, device)
    normed = last.like(gradient.path.with_name("normed.f32"))
    with torch.no_grad():
        for batch in last.batches():
            normed.write(batch, norm(last.read(batch).to(device)))

    def read(rows: Tensor) -> Tensor:
        return read_rows(normed, rows).to(device)

    def pieces() -> Iterator[HeadPiece]:
        return head_pieces(view, device)

    losses, log_normaliser = head_losses(read, pieces, targets)
    with gradient.path.open("wb") as file:
        file.truncate(last.tokens * last.width * 4)
    head_gradient(read, partial(_add_rows, gradient), pieces, targets, log_normaliser)
    for batch in last.batches():
        states = last.read(batch).to(device).requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(norm(states), gradient.read(batch).to(device))
        assert states.grad is not None
        gradient.write(batch, states.grad)
    normed.remove()
    return losses


def _add_rows(states: HiddenStates, rows: Tensor, values: Tensor) -> None:
    """Add values (rows, width) to rows of a file of states; the rows rise."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    flat = HiddenStates(states.path, [first, last - first] if first else [last], states.width)
    number = [1 if first else 0]
    block = flat.read(number)
    block[0].index_add_(0, rows - first, values)
    flat.write(number, block)
