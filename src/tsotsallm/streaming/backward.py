"""The sweep from last to first: gradients of the loss with one layer in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tsotsallm.checkpoint.view import View
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.frame import Frame, head_pieces, load_final_norm
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.score import Predictions, head_tallies, read_rows
from tsotsallm.streaming.sweep import Tick, embed_corpus, silent


def backward_sweep(view: View, corpus: Corpus, scratch: Path, device: torch.device,
                   tick: Tick = silent) -> Iterator[tuple[int, dict[str, tuple[Tensor, Tensor]]]]:
    """Yield, from the last layer to the first, name -> (weight, gradient of the mean next-token loss), float32.

    The inputs of every layer are kept on disk; each layer is loaded again, recomputed and back-propagated. Files get
    their names when they are complete: called again on the same `scratch` after a kill, the sweep goes on with the layer
    that it was at, and layers that were yielded before it are not yielded again.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    lengths = [len(window) for window in corpus.windows]
    layers = view.spec.layers
    inputs = [HiddenStates(scratch / f"inputs-{index:04d}.f32", lengths, view.spec.hidden)
              for index in range(layers + 1)]
    gradients = [states.like(scratch / f"gradient-{index:04d}.f32") for index, states in enumerate(inputs)]
    frame = Frame(view.spec, device)
    at = next((index for index in range(layers + 1) if gradients[index].exists()), None)
    if at is None:
        _inputs_of_all_layers(view, corpus, inputs, frame, tick)
        with gradients[layers].drafted() as draft:
            _gradient_of_head(view, corpus, inputs[layers], draft, device)
        at = layers
    for index in reversed(range(at)):
        frame.load(index, view.layer(index))
        frame.layer.requires_grad_(True)
        with torch.enable_grad(), gradients[index].drafted() as draft:
            for batch in inputs[index].batches():
                states = inputs[index].read(batch).to(device).requires_grad_()
                torch.autograd.backward(frame(states), gradients[index + 1].read(batch).to(device))
                assert states.grad is not None
                draft.write(batch, states.grad)
            found = {}
            for name, weight in frame.layer.named_parameters():
                assert weight.grad is not None
                found[name] = (weight.detach(), weight.grad)
            yield index, found      # the draft is complete only when the next layer is asked for
            found.clear()
        gradients[index + 1].remove()
        inputs[index + 1].remove()
        tick("backward", (layers - index) / layers)
    frame.clear()
    inputs[0].remove()
    gradients[0].remove()


@torch.no_grad()
def _inputs_of_all_layers(view: View, corpus: Corpus, inputs: Sequence[HiddenStates], frame: Frame, tick: Tick) -> None:
    if not inputs[0].exists():
        with inputs[0].drafted() as draft:
            embed_corpus(view, corpus, draft)
    for index in range(view.spec.layers):
        if not inputs[index + 1].exists():
            frame.load(index, view.layer(index))
            with inputs[index + 1].drafted() as draft:
                for batch in inputs[index].batches():
                    draft.write(batch, frame(inputs[index].read(batch)))
        tick("forward", (index + 1) / view.spec.layers)


def _gradient_of_head(view: View, corpus: Corpus, last: HiddenStates, gradient: HiddenStates,
                      device: torch.device) -> None:
    """∂(mean loss)/∂(output of the last layer), through head and final norm, written to `gradient`."""
    norm = load_final_norm(view, device)
    normed = last.like(gradient.path.with_name("normed.f32"))
    with torch.no_grad():
        for batch in last.batches():
            normed.write(batch, norm(last.read(batch).to(device)))
        [tally] = head_tallies(view, [normed], corpus, device)
        predictions = Predictions(corpus)
        with gradient.path.open("wb") as file:
            file.truncate(last.tokens * last.width * 4)
        for first, weights in head_pieces(view, device):
            for block in predictions.blocks():
                rows, targets = predictions.rows[block], predictions.targets[block]
                logits = read_rows(normed, rows).to(device) @ weights.mT
                share = (logits - tally.log_normaliser[block].to(logits)[:, None]).exp()
                inside = (targets >= first) & (targets < first + len(weights))
                share[inside.nonzero()[:, 0], targets[inside] - first] -= 1
                _add_rows(gradient, rows, (share @ weights).cpu() / len(predictions))
    for batch in last.batches():
        states = last.read(batch).to(device).requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(norm(states), gradient.read(batch).to(device))
        assert states.grad is not None
        gradient.write(batch, states.grad)
    normed.remove()


def _add_rows(states: HiddenStates, rows: Tensor, values: Tensor) -> None:
    """Add to rising rows of a file of states."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    flat = HiddenStates(states.path, [first, last - first] if first else [last], states.width)
    number = [1 if first else 0]
    block = flat.read(number)
    block[0].index_add_(0, rows - first, values)
    flat.write(number, block)
