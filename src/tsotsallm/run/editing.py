"""Passes that write layers as they are, or edit their linears layer by layer after the surveys that some edits need."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.shapes import input_groups
from tsotsallm.errors import NumericsError
from tsotsallm.journal import Surveyed, Weighed
from tsotsallm.machine import release_memory, side_by_side
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.run.passes import Pass
from tsotsallm.run.work import plain_stages
from tsotsallm.stages.contract import LinearEdit
from tsotsallm.stages.ends import head_gram
from tsotsallm.store import link_tree
from tsotsallm.streaming.sensitivity import token_weights, weights_of
from tsotsallm.streaming.sweep import SweepOptions, Visit
from tsotsallm.training.trainee import LayerChanges

REOBSERVED = ("o_proj", "down_proj")
SMALL = 1 << 20
"""Weights of a linear up to which edits that leave Python change several at once, each on one thread; larger ones have rows
enough for all threads."""


class Copying(Pass):
    """Writes the layers that are left as they are stored."""

    def write(self) -> None:
        """Copy layer after layer."""
        for index in range(self.output.finished_layers, self.view.spec.layers):
            self.current = index
            self.layer_tick("copying", 0.0)
            self.put(index, LayerChanges)
            self.output.settled(index)
        self.complete(self.first_visit if self.is_last else None)

    @property
    def is_last(self) -> bool:
        """Whether this pass writes the result."""
        return self.number + 1 == len(self.work.sweeps)

    @cached_property
    def first_visit(self) -> list[int]:
        """For each layer the first one that it shares its weights with: itself unless repeats are shared."""
        layers = range(self.origin.spec.layers)
        if not self.work.recipe.shared:
            return list(layers)
        seen: dict[int, int] = {}
        return [seen.setdefault(self.origin.stored(index), index) for index in layers]

    def put(self, index: int, learned: Callable[[], LayerChanges]) -> None:
        """Write a layer; a shared one at its first visit, its repeats by name in the result and written out before it."""
        first = self.first_visit[index]
        if first == index:
            self.output.write(self.view, index, learned())
        else:
            self.output.repeat(index, first, by_name=self.is_last)


class Editing(Copying):
    """Gives every linear new values, knowing its inputs; all edits of the sweep in one pass."""

    def write(self) -> None:
        """Survey, edit layer after layer, and round embeddings and head where an edit does so."""
        edits = tuple(self.decided(place, edit, partial(self.survey, place)) for place, edit in enumerate(self.sweep.edits))
        self.sweep = replace(self.sweep, edits=edits)
        needs, corpus, layers = self.sweep.needs, self.work.corpus, self.view.spec.layers
        end_grids: dict[str, GgmlGrid] = {}
        for edit in edits:
            end_grids |= edit.end_grids(self.view)
        self.current = self.output.finished_layers
        if self.current < layers:
            states = self.enter(corpus) if needs.gram else None
            originals = self.enter(corpus, "original") if needs.original_inputs else None
            for visit in self.visits(states, observe=needs.gram, options=SweepOptions(
                    self.load, self.output.settled, self.token_weights(), originals, beyond=bool(end_grids),
                    judges=needs.held_out, aims=self.aims)):
                self.put(visit.index, partial(self.edit_layer, edits, visit))
            if originals is not None:
                originals.remove()
        ends: dict[str, Tensor] = {}
        if end_grids:
            outputs = self.states_of(corpus).inputs_of(layers) if needs.gram else None
            gram = head_gram(self.view, outputs) if outputs is not None else None
            for edit in edits:
                ends |= edit.round_ends(self.view, gram, self.layer_tick)
        self.complete(self.first_visit if self.is_last else None, ends, end_grids)
        if corpus is not None:
            self.states_of(corpus).remove()

    def load(self, index: int) -> dict[str, Tensor]:
        """The tensors of a layer; those of a shared one as they were written at its first visit."""
        first = self.first_visit[index]
        return self.view.layer(index) if first == index else self.output.read(first)

    def survey(self, place: int) -> dict[str, object]:
        """What a stage finds out by itself, or in a sweep through the model as the edits before will leave it."""
        work, edits, view = self.work, self.sweep.edits, self.view
        edit, before, corpus = edits[place], edits[:place], work.corpus
        found = edit.survey(view, self.workplace("survey"))
        if found is not None:
            return found
        assert corpus is not None
        probe, notes = edit.probe(sparse=self.lineage.sparse or any(one.leaves_zeros for one in before))
        layers, weights = view.spec.layers, self.token_weights()
        shared = work.key(plain_stages(self.sweep.choices), plain_stages(before), edit.measured_by, sweeps=self.number)
        if measured := work.measured(shared):
            return edit.decide(Surveyed.parsed({"sweep": self.number, "place": place, "notes": measured}).notes, view)
        for entry in work.journal.find(Surveyed, self.number, place):
            notes |= entry.notes
        self.current = len({key.partition(".")[0] for key in notes})
        states = self.enter(corpus, "survey")
        originals = self.enter(corpus, "survey/original") if self.sweep.needs.original_inputs else None

        def settled(index: int) -> None:
            own = {key: value for key, value in notes.items() if key.startswith(f"{index}.")}
            work.journal.add(Surveyed(self.number, place, own))

        if self.current < layers:
            for visit in self.visits(states, observe=True, options=SweepOptions(
                    settled=settled, weights=weights, originals=originals, beyond=True, peaks=edit.needs.peaks,
                    aims=self.aims)):
                self.edit_layer((*before, probe), visit)
        # what attention adds to the residual is what embeddings begin it with
        squares = corpus.tokens * float(weights(0).get("self_attn.o_proj.square", 0.0))
        edit.probe_ends(view, corpus, states.inputs_of(layers), notes, squares)
        shutil.rmtree(work.scratch / "survey")
        work.share(shared, notes)
        return edit.decide(notes, view)

    def token_weights(self) -> Callable[[int], dict[str, Tensor]]:
        """How much each token counts at each linear of a layer: found before the first layer of a sweep is edited."""
        if not self.sweep.needs.token_weights:
            return lambda _index: {}
        work = self.work
        assert work.corpus is not None
        kept = work.partial / f"weights-{self.number + 1}"
        if not work.journal.find(Weighed, self.number):
            shared = work.key(plain_stages(self.sweep.choices), sweeps=self.number)
            piece = work.store.find("sensitivities", shared) if work.store is not None else None
            if piece is not None:
                shutil.rmtree(kept, ignore_errors=True)
                link_tree(piece / "layers", kept)
            else:
                token_weights(self.view, work.corpus, kept, work.scratch / "backward", work.device, self.tick)
                if work.store is not None:
                    work.store.keep("sensitivities", shared, {"layers": kept}, {})
            work.journal.add(Weighed(self.number))
        return partial(weights_of, kept)

    def edit_layer(self, edits: tuple[LinearEdit, ...], visit: Visit) -> LayerChanges:
        """Apply edits to all linears of a layer; the layer then computes with what will be read back."""
        active = [edit for edit in edits if edit.applies_to(visit.index, self.view.spec.layers)]
        changes, names = LayerChanges(), visit.names
        if not active:
            return changes
        last = sum(edit.needs.factor for edit in active) <= 1
        again = [name for name in names if name.rpartition(".")[2] in REOBSERVED and any(
            edit.needs.second_observation for edit in active)]
        at_once = self.work.device.type == "cpu" and any(edit.leaves_python for edit in active)
        observed_again, waiting, forgotten = False, list[str](), list[Linear]()

        def settle(*linears: Linear) -> None:
            for linear in linears:
                visit.grams.pop(linear.name, None)
                if not linear.edited:
                    continue                # it is written as it is stored
                _require_finite(linear, visit.index)
                if linear.values is not None:
                    linear.values = linear.values.to(linear.storage)    # as it is written; float32 is needed no more
                linear.reference, linear.mask = torch.empty(0), None
                visit.forget(linear.name)
                forgotten.append(linear)
                changes.merged[linear.name] = linear

        def settle_waiting() -> None:
            largest_first = sorted(waiting, key=lambda name: visit.linear(name).reference.numel(), reverse=True)
            settle(*side_by_side(edited, largest_first, len(waiting)))
            waiting.clear()

        def compute_with_edited() -> None:
            for linear in forgotten:
                visit.commit(linear)
            forgotten.clear()

        @torch.no_grad()                    # which a thread does not inherit
        def edited(name: str) -> Linear:
            linear = self.linear(visit, name)
            for edit in active:
                edit.edit(linear, visit.grams.get(name), visit.index, last=last)
            return linear

        for group in sorted(input_groups(names), key=lambda group: group[0] in again):
            if group[0] in again and not observed_again:
                settle_waiting()
                compute_with_edited()
                visit.observe(again)
                observed_again = True
            for name in group:
                self.layer_tick(f"editing {name.rpartition('.')[2]}", names.index(name) / len(names))
                if at_once and visit.linear(name).reference.numel() <= SMALL:
                    waiting.append(name)
                else:
                    release_memory()        # what a large linear took, the next one takes again
                    settle(edited(name))
        settle_waiting()
        compute_with_edited()
        return changes

    def linear(self, visit: Visit, name: str) -> Linear:
        """A linear of the layer in memory, with the weight that corrections aim at and its pruned zeros."""
        linear = visit.linear(name)
        if self.lineage.sparse:
            linear.mask = linear.reference != 0
        if self.aims is not None:
            linear.values = linear.reference.clone()
            linear.reference = self.aims(visit.index)(name)
        return linear

    @property
    def aims(self) -> Callable[[int], Callable[[str], Tensor]] | None:
        """The weights that corrections aim at, by layer and name, where passes before changed those in memory."""
        if self.view.checkpoint is self.origin.checkpoint:
            return None
        return lambda index: lambda name: self.origin.layer_tensor(index, f"{name}.weight").to(self.work.device)


def _require_finite(linear: Linear, layer: int) -> None:
    if not (linear.stored.finite if linear.stored is not None else bool(torch.isfinite(linear.dense).all())):
        raise NumericsError(f"layer {layer}, {linear.name}: the edit gave values that are not finite; raise damp, or "
                            "calibrate on more text")
