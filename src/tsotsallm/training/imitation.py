"""Trains layers one after another to give the original's outputs at the same depth, with one layer in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tsotsallm.checkpoint.reader import layer_prefix
from tsotsallm.checkpoint.view import View
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.frame import Frame
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.sweep import Tick, Visit, embed_corpus
from tsotsallm.training.loop import Curve, Schedule, train
from tsotsallm.training.objectives import ImitatingLayer
from tsotsallm.training.samples import Samples
from tsotsallm.training.trainee import LayerChanges, Trainee


class Original:
    """The hidden states of the original model, advanced layer by layer beside a sweep."""

    def __init__(self, view: View, corpus: Corpus, directory: Path, device: torch.device) -> None:
        self.view, self.corpus, self.directory, self.device = view, corpus, directory, device
        self.lengths = [len(window) for window in corpus.windows]
        directory.mkdir(parents=True, exist_ok=True)

    def entering(self, layer: int) -> HiddenStates:
        """The file for the states that enter a layer of the original."""
        return HiddenStates(self.directory / f"original-enters-{layer:04d}.f32", self.lengths, self.view.spec.hidden)

    @torch.no_grad()
    def advance(self, layer: int, tick: Tick) -> HiddenStates:
        """Compute the states that enter `layer` of the original; earlier ones are deleted."""
        at = next((index for index in range(layer, -1, -1) if self.entering(index).exists()), None)
        if at is None:
            with self.entering(0).drafted() as draft:
                embed_corpus(self.view, self.corpus, draft)
            at = 0
        frame = Frame(self.view.spec, self.device)
        for index in range(at, layer):
            frame.load(index, self.view.layer(index))
            inputs = self.entering(index)
            with self.entering(index + 1).drafted() as draft:
                for batch in inputs.batches():
                    draft.write(batch, frame(inputs.read(batch)))
                    tick("running the original", (index - at) / (layer - at))
            inputs.remove()
        frame.clear()
        return self.entering(layer)


class Imitation:
    """Trains the layers of a model that keeps the layers `kept` of the original.

    A layer learns to give the states that enter the next kept layer of the original, and so compensates for layers that
    were removed after it. All weights are trained, or the factors of `trainee`; zeros of a sparse model stay zero.
    """

    def __init__(self, original: View, kept: list[int], samples: Samples, schedule: Schedule, directory: Path,
                 device: torch.device, *, trainee: Trainee | None, sparse: bool) -> None:
        self.trained_windows = len(samples.training.windows)
        self.corpus = Corpus((*samples.training.windows, *samples.held_out.windows), samples.training.source)
        self.original = Original(original, self.corpus, directory, device)
        self.ends = [*kept[1:], original.spec.layers]
        self.schedule, self.trainee, self.sparse = schedule, trainee, sparse
        self.wanted: HiddenStates | None = None

    def prepare(self, index: int, tick: Tick) -> None:
        """Compute the target states of layer `index`; call it before that layer is in memory."""
        self.wanted = self.original.advance(self.ends[index], tick)

    def train(self, visit: Visit, tick: Tick) -> tuple[Curve, LayerChanges]:
        """Train the layer in memory, which afterwards computes with the weights as they will be read back."""
        assert visit.inputs is not None
        assert self.wanted is not None
        trainee = self.trainee
        objective = ImitatingLayer(visit.frame, visit.inputs, self.wanted, self.trained_windows,
                                   trainee.adapted.begin if trainee else _nothing)
        if trainee is None:
            return self._train_all(visit, objective, tick)
        undo = trainee.adapted.install(visit.frame.layer, visit.index)
        curve = train(trainee.adapted.of_layer(visit.index), objective, self.schedule, tick=tick)
        undo()
        learned = trainee.layer(visit.index)
        for linear in learned.merged.values():
            visit.commit(linear)
        for name, low_rank in learned.beside.items():
            base = _without_correction(trainee.base, visit.index, name)
            visit.frame.linear(name).weight.data.copy_(low_rank.added_to(base))
        parameters = dict(visit.frame.layer.named_parameters())
        for name, tensor in learned.changed.items():
            parameters[name].data.copy_(tensor)
        return curve, learned

    def _train_all(self, visit: Visit, objective: ImitatingLayer, tick: Tick) -> tuple[Curve, LayerChanges]:
        layer = visit.frame.layer.requires_grad_(True)
        weights = dict(layer.named_parameters())
        zeros = {name: weight.detach() == 0 for name, weight in weights.items() if self.sparse and weight.ndim == 2}

        def hold_zeros() -> None:
            for name, where in zeros.items():
                gradient = weights[name].grad
                assert gradient is not None
                gradient.masked_fill_(where, 0.0)

        curve = train(dict(weights), objective, self.schedule, after=hold_zeros, tick=tick)
        layer.requires_grad_(False)
        learned = LayerChanges()
        for weight in weights.values():
            weight.grad = None
            weight.data = weight.data.to(visit.storage).float()
        for name in visit.names:
            learned.merged[name] = visit.linear(name)
        linears = {f"{name}.weight" for name in visit.names}
        learned.changed |= {name: weight.data.to(visit.storage) for name, weight in weights.items() if name not in linears}
        return curve, learned


def _without_correction(view: View, index: int, name: str) -> Tensor:
    """A linear's weight without the low-rank correction that stands beside it, (d_out, d_in) float32."""
    weight = view.layer_tensor(index, f"{name}.weight")
    kept = view.checkpoint.beside(layer_prefix(view.stored(index)) + name)
    return weight if kept is None else kept.added_to(weight, -1)


def _nothing(_step: int, *, active: bool) -> None:
    """Do nothing: there is no dropout."""
