"""One pass over all layers: load a layer, observe it, let the caller edit it, propagate its outputs, release it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.shapes import input_groups
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import ResourceError
from tsotsallm.machine import release_memory
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.frame import Frame, InputsSeen
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.statistics import Gram

Tick = Callable[[str, float], None]
"""Called with progress inside a layer: the current step, and how much of it is done, from 0 to 1."""


def silent(_what: str, _share: float) -> None:
    """A tick that prints nothing."""


FEW = 2
"""Tokens for each input below which a Gram says little of other text."""


def follows_alone(shapes: Sequence[Sequence[int]]) -> bool:
    """Whether the linears of these shapes (d_out, d_in), which share an input, are one with fewer outputs than inputs.

    What it makes of its inputs' lag is then smaller than the lag itself.
    """
    return len(shapes) == 1 and shapes[0][0] < shapes[0][1]


class TwoStates:
    """The inputs of layer i and those of layer i + 1, in two files that alternate.

    The inputs of a layer stay untouched until the next layer's are complete, so an interrupted sweep can resume.
    """

    def __init__(self, directory: Path, lengths: Sequence[int], width: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.files = [HiddenStates(directory / f"hidden-{side}.f32", lengths, width) for side in "ab"]

    def inputs_of(self, layer: int) -> HiddenStates:
        """The file for the inputs of a layer."""
        return self.files[layer % 2]

    def remove(self) -> None:
        """Delete both files."""
        for file in self.files:
            file.remove()


def embed_corpus(view: View, corpus: Corpus, states: HiddenStates) -> HiddenStates:
    """Write the embeddings of all windows: the inputs of layer 0."""
    for batch in states.batches():
        ids = torch.stack([corpus.windows[index] for index in batch])
        states.write(batch, view.embed(ids.flatten()).view(*ids.shape, -1))
    return states


@dataclass
class Visit:
    """One layer while it is in memory.

    index      its number in the view
    frame      the module that computes with it
    storage    the floating-point type for new tensors
    grams      linear -> the Gram of its inputs, once observed
    inputs     the hidden states that enter it
    originals  its inputs in the model as it was before this sweep, and the file for its outputs there
    weights    linear -> weight of each token, (tokens,)
    judges     whether inputs are held out where there are few tokens for a Gram
    peaks      whether Grams know the largest inputs of blocks of columns
    aims       linear -> the weight that it aims at; by default that in memory
    """

    index: int
    frame: Frame
    storage: torch.dtype
    grams: dict[str, Gram] = field(default_factory=dict)
    inputs: HiddenStates | None = None
    originals: tuple[HiddenStates, HiddenStates | None] | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    tick: Tick = silent
    judges: bool = False
    peaks: bool = False
    aims: Callable[[str], Tensor] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the layer's linears in the order of execution."""
        return self.frame.linear_names()

    def linear(self, name: str) -> Linear:
        """A linear as it is in memory now; its weight is not copied."""
        return Linear(name, self.frame.linear(name).weight.data, self.storage)

    def gram_of(self, name: str) -> Gram:
        """The Gram of a linear's inputs, (d_in, d_in), as observed."""
        return self.grams[name]

    def observe(self, names: list[str] | None = None) -> None:
        """Run the corpus through the layer as it is now and accumulate the Grams of the inputs of `names`, or of all
        linears.

        Linears that share an input share a Gram. Where it `judges`, a Gram for which there are fewer than FEW tokens for
        each input leaves out a quarter of them, the last windows, and keeps some of their inputs. With `originals`, which
        require that the layer is still unedited, the Grams also hold their lag behind them, and the original outputs are
        written.
        """
        assert self.inputs is not None
        grams: dict[str, Gram] = {}
        original: dict[str, Tensor] = {}
        followers = self._followers()
        for batch in self.inputs.batches():
            if self.originals is not None:
                with self.frame.watching(self.names, original.__setitem__, to_the_end=True):
                    outputs = self.frame(self.originals[0].read(batch))
                if self.originals[1] is not None:
                    self.originals[1].write(batch, outputs)
            tokens = slice(self.inputs.starts[batch[0]], self.inputs.starts[batch[-1] + 1])
            shared: list[tuple[Tensor, Gram]] = []

            def add(name: str, inputs: Tensor, tokens: slice = tokens, shared: list[tuple[Tensor, Gram]] = shared) -> None:
                if shared and inputs is shared[0][0]:
                    grams.setdefault(name, shared[0][1])
                    return
                if name not in grams:
                    grams[name] = Gram(inputs.shape[-1], self.frame.device, follows=self.originals is not None,
                                       follower=followers.get(name), peaks=self.peaks)
                weights = self.weights.get(name)
                self._divide(grams[name], inputs, tokens, None if weights is None else weights[tokens], original.get(name))
                shared[:] = [(inputs, grams[name])]

            with suppress(InputsSeen), self.frame.watching(self.names if names is None else names, add, to_the_end=False):
                self.frame(self.inputs.read(batch))
            self.tick("observing", (batch[-1] + 1) / len(self.inputs.lengths))
        for name, gram in grams.items():
            if (square := self.weights.get(f"{name}.square")) is not None:
                gram.squares[name] = float(square)
                gram.outputs[name] = self.weights[f"{name}.outputs"]
        for gram in grams.values():
            gram.follower = None
        self.grams |= grams

    def _followers(self) -> dict[str, Tensor]:
        """The weights of linears that follow alone, where the layer has another input than in the original."""
        if self.originals is None:
            return {}
        weights = {name: self.frame.linear(name).weight.data for name in self.names}
        aims = self.aims or weights.__getitem__
        return {group[0]: aims(group[0]) for group in input_groups(self.names)
                if follows_alone([weights[name].shape for name in group])}

    def _divide(self, gram: Gram, inputs: Tensor, tokens: slice, weights: Tensor | None, original: Tensor | None) -> None:
        """Add the inputs of tokens to a Gram, and hold out those that it should not see."""
        assert self.inputs is not None
        whole, width = self.inputs.tokens, inputs.shape[-1]
        seen = whole - tokens.start
        if self.judges and whole < FEW * width:
            begins = [start for start in self.inputs.starts if 0 < start < whole and start >= whole - whole // 4]
            seen = (begins[0] if begins else whole - whole // 4) - tokens.start
        count = tokens.stop - tokens.start
        if seen >= count:
            gram.add(inputs, weights, original)
            return
        rows = inputs.reshape(-1, width)
        if seen > 0:
            gram.add(rows[:seen], None if weights is None else weights[:seen],
                     None if original is None else original.reshape(-1, width)[:seen])
        first = max(0, seen)
        gram.hold_out(rows[first:], None if weights is None else weights[first:])

    def forget(self, name: str) -> None:
        """Spare the memory of a linear's weight until it is committed; nothing may run through the layer before."""
        weight = self.frame.linear(name).weight
        weight.data = weight.data.new_empty(0)

    def commit(self, linear: Linear) -> None:
        """Make the layer compute with a linear's effective weight from now on."""
        weight = self.frame.linear(linear.name).weight
        weight.data = linear.effective().to(weight.data)

    def propagate(self, outputs: HiddenStates) -> None:
        """Run the corpus through the layer as it is now and write its outputs."""
        assert self.inputs is not None
        for batch in self.inputs.batches():
            outputs.write(batch, self.frame(self.inputs.read(batch)))
            self.tick("propagating", (batch[-1] + 1) / len(self.inputs.lengths))


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep does besides: where tensors come from, what is called when, and what else the corpus runs through.

    load       layer -> its tensors; by default the view's
    settled    called with a layer when its outputs are safe on disk
    weights    layer -> the weights of its tokens
    originals  inputs of the first layer for the model as it was: the corpus also runs through the unedited layers
    beyond     propagate through the last layer too
    judges     hold out some inputs where there are few tokens; see `Visit.observe`
    peaks      note the largest inputs of blocks of columns; see `Gram`
    aims       layer -> the weights that its linears aim at, by name; None where they are those of the view
    """

    load: Callable[[int], dict[str, Tensor]] | None = None
    settled: Callable[[int], None] = lambda _index: None
    weights: Callable[[int], dict[str, Tensor]] = lambda _index: {}
    originals: TwoStates | None = None
    beyond: bool = False
    judges: bool = False
    peaks: bool = False
    aims: Callable[[int], Callable[[str], Tensor]] | None = None


PLAIN = SweepOptions()


@torch.no_grad()
def sweep(view: View, states: TwoStates | None, *, observe: bool, device: torch.device, start: int = 0, tick: Tick = silent,
          options: SweepOptions = PLAIN) -> Iterator[Visit]:
    """Visit the layers from `start` on; after the caller has edited a layer, its outputs are propagated to the next.

    `states` holds the inputs of layer `start`; without it layers are visited, but nothing runs through them. With `observe`
    each visit has the Grams of its layer. Raises ResourceError where hidden states cannot be written.
    """
    load, originals = options.load or view.layer, options.originals
    frame = Frame(view.spec, device)
    for index in range(start, view.spec.layers):
        tick("loading", 0.0)
        frame.clear()
        release_memory()
        frame.load(index, load(index))
        inputs = states.inputs_of(index) if states is not None else None
        visit = Visit(index, frame, view.checkpoint.storage, inputs=inputs, weights=options.weights(index), tick=tick,
                      judges=options.judges, peaks=options.peaks,
                      aims=None if options.aims is None else options.aims(index))
        if originals is not None:
            after = originals.inputs_of(index + 1) if index + 1 < view.spec.layers else None
            visit.originals = originals.inputs_of(index), after
        if observe:
            visit.observe()
            visit.originals = None              # the layer is edited now
            release_memory()
        yield visit
        visit.grams.clear()
        if states is not None and (options.beyond or index + 1 < view.spec.layers):
            try:
                outputs = states.inputs_of(index + 1)
                visit.propagate(outputs)
                outputs.flush()
                if originals is not None and index + 1 < view.spec.layers:
                    originals.inputs_of(index + 1).flush()
            except OSError as error:
                raise ResourceError(f"the hidden states could not be written to {outputs.path.parent} "
                                    f"({error.strerror or error}); free some space or choose another --scratch, then run "
                                    "the same command again: finished layers are kept") from None
        options.settled(index)
    frame.clear()
