"""The pass that edits linears, layer by layer, and the surveys that some edits need before it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.shapes import input_groups
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import NumericsError
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.recipe import Sweep
from tsotsallm.run.output import Output
from tsotsallm.run.work import Work, plain_stages
from tsotsallm.stages.contract import LinearEdit, Workplace
from tsotsallm.stages.ends import head_gram
from tsotsallm.store import link_tree
from tsotsallm.streaming.sensitivity import token_weights, weights_of
from tsotsallm.streaming.statistics import Gram
from tsotsallm.streaming.sweep import Visit, sweep
from tsotsallm.training.lora import LayerChanges

REOBSERVED = ("o_proj", "down_proj")


def edit_layers(work: Work, number: int, one: Sweep, view: View, origin: View) -> None:
    """Write every layer of one sweep, then the whole of its checkpoint."""
    surveys = [partial(_survey, work, number, one, place, view, origin) for place, _ in enumerate(one.edits)]
    one = replace(one, edits=tuple(work.decided(number, place, edit, survey)
                                   for place, (edit, survey) in enumerate(zip(one.edits, surveys, strict=True))))
    output = Output(work.directory(number), work.journal, number)
    layers = view.spec.layers
    end_grids: dict[str, GgmlGrid] = {}
    for edit in one.edits:
        end_grids |= edit.end_grids(view)
    last = number + 1 == len(work.sweeps)
    first_visit = _first_visits(work, origin)
    current = output.finished_layers
    tick = work.tick(number, layers, lambda: current)

    def load(index: int) -> dict[str, Tensor]:
        return view.layer(index) if first_visit[index] == index else output.read(first_visit[index])

    def write(index: int, learned: Callable[[], LayerChanges]) -> None:
        """A shared layer is written at its first visit; before the result its repeats are written out."""
        if first_visit[index] == index:
            output.write(view, index, learned())
        else:
            output.repeat(index, first_visit[index], by_name=last)

    if one.edits and current < layers:
        states = work.states(work.corpus, view, current) if one.needs.gram else None
        originals = work.states(work.corpus, view, current, "original") if one.needs.original_inputs else None
        for visit in sweep(view, states, observe=one.needs.gram, device=work.device, start=current, load=load,
                           settled=output.settled, beyond=bool(end_grids), originals=originals,
                           weights=_weights(work, number, one, view), tick=tick):
            current = visit.index
            write(current, partial(edit_layer, work, one.edits, visit, view, origin, tick))
        if originals is not None:
            originals.remove()
    for index in range(current, layers if not one.edits else 0):
        current = index
        tick("copying", 0.0)
        write(index, LayerChanges)
        output.settled(index)
    ends: dict[str, Tensor] = {}
    if end_grids:
        outputs = work.states(work.corpus, view, layers).inputs_of(layers) if one.needs.gram else None
        gram = head_gram(view, outputs, work.device) if outputs is not None else None
        for edit in one.edits:
            ends |= edit.round_ends(view, gram, tick)
    work.complete(number, output, view, first_visit if last else None, ends, end_grids)
    if work.corpus is not None:
        work.states_files(work.corpus, view).remove()


def _survey(work: Work, number: int, one: Sweep, place: int, view: View, origin: View) -> dict[str, Any]:
    """What a stage finds out by itself, or in a sweep through the model as the edits before will leave it."""
    workplace = Workplace(work.corpus, work.scratch / "survey", work.device, work.tick(number))
    found = one.edits[place].survey(view, workplace)
    if found is not None:
        return found
    assert work.corpus is not None
    probe, notes = one.edits[place].probe(sparse=work.sparse or any(
        edit.leaves_zeros for edit in one.edits[:place]))
    layers, weights = view.spec.layers, _weights(work, number, one, view)
    shared = work.key(plain_stages(one.choices), plain_stages(one.edits[:place]), one.edits[place].measured_by,
                      sweeps=number)
    if found := work.measured(shared):
        return one.edits[place].decide(found, view)
    for entry in work.journal.find("surveyed", number):
        if entry["place"] == place:
            notes |= entry["notes"]
    current = len({key.partition(".")[0] for key in notes})
    states = work.states(work.corpus, view, current, "survey")
    originals = work.states(work.corpus, view, current, "survey/original") if one.needs.original_inputs else None
    tick = work.tick(number, layers, lambda: current)

    def settled(index: int) -> None:
        found = {key: value for key, value in notes.items() if key.startswith(f"{index}.")}
        work.journal.add(kind="surveyed", sweep=number, place=place, notes=found)

    for visit in sweep(view, states, observe=True, device=work.device, start=current, settled=settled, beyond=True,
                       originals=originals, weights=weights, tick=tick) if current < layers else ():
        current = visit.index
        edit_layer(work, (*one.edits[:place], probe), visit, view, origin, tick)
    # what attention adds to the residual is what embeddings begin it with
    squares = work.corpus.tokens * float(weights(0).get("self_attn.o_proj.square", 0.0))
    one.edits[place].probe_ends(view, work.corpus, states.inputs_of(layers), notes, squares)
    shutil.rmtree(work.scratch / "survey")
    work.share(shared, notes)
    return one.edits[place].decide(notes, view)


def edit_layer(work: Work, edits: tuple[LinearEdit, ...], visit: Visit, view: View, origin: View,
               tick: Callable[[str, float], None]) -> LayerChanges:
    """Apply all edits to all linears of a layer; the layer then computes with what will be read back."""
    active = [edit for edit in edits if edit.applies_to(visit.index, view.spec.layers)]
    names = visit.names
    edited: dict[str, Linear] = {}
    if not active:
        return LayerChanges()
    only_factor = sum(edit.needs.factor for edit in active) <= 1
    again = any(edit.needs.second_observation for edit in active)
    groups = input_groups(names)
    if again:
        groups.sort(key=lambda group: group[0].rpartition(".")[2] in REOBSERVED)
    observed_again = False
    for group in groups:
        if again and not observed_again and group[0].rpartition(".")[2] in REOBSERVED:
            visit.observe([name for name in names if name.rpartition(".")[2] in REOBSERVED])
            observed_again = True
        gram: Gram | None = visit.grams.get(group[0])
        for name in group:
            tick(f"editing {name.rpartition('.')[2]}", names.index(name) / len(names))
            linear = visit.linear(name)
            if work.sparse:
                linear.mask = linear.reference != 0
            if view.checkpoint is not origin.checkpoint:
                linear.values = linear.reference.clone()
                linear.reference = origin.layer_tensor(visit.index, f"{name}.weight").to(work.device)
            for edit in active:
                edit.edit(linear, gram, visit.index, last=only_factor)
            if not linear.edited:
                continue                # it is written as it is stored
            _require_finite(linear, visit.index)
            visit.commit(linear)
            if linear.values is not None:
                linear.values = linear.values.to(linear.storage)    # as it is written; float32 is needed no more
            linear.reference, linear.mask = torch.empty(0), None
            edited[name] = linear
        for name in group:
            visit.grams.pop(name, None)
    return LayerChanges(edited)


def _first_visits(work: Work, origin: View) -> list[int]:
    """For each layer the first one that it shares its weights with: itself unless repeats are shared."""
    layers = range(origin.spec.layers)
    if not work.recipe.shared:
        return list(layers)
    seen: dict[int, int] = {}
    return [seen.setdefault(origin.stored(index), index) for index in layers]


def _weights(work: Work, number: int, one: Sweep, view: View) -> Callable[[int], dict[str, Tensor]]:
    """How much each token counts at each linear of a layer: found before the first layer of a sweep is edited."""
    if not one.needs.token_weights:
        return lambda _index: {}
    assert work.corpus is not None
    kept = work.partial / f"weights-{number + 1}"
    if not work.journal.find("weighed", number):
        shared = work.key(plain_stages(one.choices), sweeps=number)
        piece = work.store.find("sensitivities", shared) if work.store is not None else None
        if piece is not None:
            shutil.rmtree(kept, ignore_errors=True)
            link_tree(piece / "layers", kept)
        else:
            token_weights(view, work.corpus, kept, work.scratch / "backward", work.device, work.tick(number))
            if work.store is not None:
                work.store.keep("sensitivities", shared, {"layers": kept}, {})
        work.journal.add(kind="weighed", sweep=number)
    return partial(weights_of, kept)


def _require_finite(linear: Linear, layer: int) -> None:
    if not (linear.stored.finite if linear.stored is not None else bool(torch.isfinite(linear.dense).all())):
        raise NumericsError(f"layer {layer}, {linear.name}: the edit gave values that are not finite; raise damp, or "
                            "calibrate on more text")
