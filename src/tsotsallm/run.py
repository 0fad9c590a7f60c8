"""Execute a recipe: journaled after every layer, resumed after a kill, named only when complete."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tsotsallm import __version__
from tsotsallm.checkpoint.anatomy import input_groups
from tsotsallm.checkpoint.card import model_card
from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.reader import PROVENANCE, Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.checkpoint.writer import Writer, partial_path, publish, write_json
from tsotsallm.errors import NumericsError, ResumeError
from tsotsallm.journal import PUBLISHED, Journal, held_work, remove_work, scratch_path
from tsotsallm.machine import fingerprint, peak_rss_bytes
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.output import Output
from tsotsallm.planning import Forecast
from tsotsallm.recipe import Recipe, Sweep
from tsotsallm.stages.base import LayerChoice, LinearEdit, Stage, Workplace
from tsotsallm.stages.ends import head_gram, packed_ends
from tsotsallm.stages.neurons import Neurons
from tsotsallm.stages.retraining import Retraining
from tsotsallm.store import Store, key_of, link_tree
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.sensitivity import token_weights, weights_of
from tsotsallm.streaming.statistics import Gram
from tsotsallm.streaming.sweep import TwoStates, Visit, embed_corpus, sweep
from tsotsallm.training.engines import Engine, ResidentEngine, StreamedEngine
from tsotsallm.training.loop import Curve
from tsotsallm.training.lora import Learned
from tsotsallm.training.samples import Samples

REOBSERVED = ("o_proj", "down_proj")

SomeStage = TypeVar("SomeStage", bound=Stage)

@dataclass(frozen=True)
class Progress:
    """What a run is doing now; `share` of the layer's current step is done, or of the whole pass where `layers` is 0."""

    sweep: int
    sweeps: int
    stages: str
    layer: int
    layers: int
    step: str
    share: float


@dataclass(frozen=True)
class Result:
    """Where a finished run wrote what, and what it took."""

    path: Path
    parameters: int
    result_parameters: int
    bytes: int
    result_bytes: int
    elapsed_s: float
    peak_rss_bytes: int
    floor_s: float
    stages: list[str]
    training: list[dict[str, Any]]
    notes: list[str]

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


def run(checkpoint: Checkpoint, recipe: Recipe, out: Path, corpus: Corpus | None, forecast: Forecast, *,
        samples: Sequence[Sequence[Samples]] = (), device: str = "cpu", keep_stages: bool = False,
        scratch: Path | None = None, model_name: str = "", store: Store | None = None,
        asked: Mapping[str, Any] | None = None,
        progress: Callable[[Progress], None] = lambda _progress: None) -> Result:
    """Run a checked recipe and write its result to `out`, continuing unfinished work of the same inputs.
    `samples` are those of every stage that trains, in order; `asked`, how calibration text was asked for, is noted. What a
    recipe has in common with others that used the same `store` is taken from there; the result is the same, byte for
    byte.
    """
    partial = partial_path(out)
    stages_directory = out.with_name(out.name + "-stages")
    if out.exists() and not (partial / PUBLISHED).exists():
        raise ResumeError(f"{out} exists already; choose another name with -o, or delete it first")
    if keep_stages and stages_directory.exists() and not partial.exists():
        raise ResumeError(f"{stages_directory} exists already; delete or rename it first: the stages go there")
    identity = {"source": checkpoint.fingerprint(), "recipe": recipe.plain(), "keep_stages": keep_stages,
                "corpus": corpus.fingerprint() if corpus else None,
                "samples": [[some.fingerprint() for some in stage] for stage in samples], "device": device,
                "machine": fingerprint(), "tsotsallm": __version__}
    began = time.monotonic()
    with held_work(partial, identity):
        job = _Job(checkpoint, recipe, partial, corpus, samples, forecast, torch.device(device), scratch_path(out, scratch),
                   progress, model_name, identity, keep_stages, store, asked or {})
        if not out.exists():
            job.execute()
            write_json(job.result / "tsotsallm.run.json", {
                "elapsed_s": round(time.monotonic() - began, 1), "peak_rss_bytes": peak_rss_bytes(),
                "floor_s": round(forecast.floor_s, 1), "resumed": job.resumed})
            if job.scratch.exists():
                shutil.rmtree(job.scratch)
            (partial / PUBLISHED).touch()
            publish(job.result, out)
        stages = job.publish_stages(stages_directory)
    remove_work(partial)
    written = Checkpoint(out)
    return Result(out, forecast.parameters, forecast.result_parameters, checkpoint.weight_bytes, written.weight_bytes,
                  round(time.monotonic() - began, 1), peak_rss_bytes(), forecast.floor_s, stages,
                  _trained(out, len((written.provenance or {})["training"])), forecast.warnings)


class _Job:
    """One run while it goes on."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, partial: Path, corpus: Corpus | None,
                 samples: Sequence[Sequence[Samples]], forecast: Forecast, device: torch.device, scratch: Path,
                 progress: Callable[[Progress], None], model_name: str, identity: dict[str, Any], keep_stages: bool,
                 store: Store | None, asked: Mapping[str, Any]) -> None:
        self.asked = dict(asked)
        self.checkpoint, self.recipe, self.partial, self.corpus = checkpoint, recipe, partial, corpus
        self.samples, self.forecast = list(samples), forecast
        self.device, self.scratch, self.progress, self.model_name = device, scratch, progress, model_name
        self.identity, self.keep_stages = identity, keep_stages
        self.journal = Journal(partial / "journal.jsonl")
        self.resumed = bool(self.journal.entries)
        self.store = store if not (recipe.shared or keep_stages) else None      # repeats are written in two ways there
        self.sweeps = recipe.sweeps(one_stage_each=keep_stages)
        self.reasons: list[dict[str, Any]] = []
        self.trained: list[dict[str, Any]] = []
        self.sparse = checkpoint.is_sparse

    @property
    def result(self) -> Path:
        return self.partial / "result"

    def directory(self, number: int) -> Path:
        """Where a sweep's checkpoint is written."""
        if number + 1 == len(self.sweeps):
            return self.result
        return self.partial / f"{number + 1}-{_names(self.sweeps[number], '-')}"

    def execute(self) -> None:
        """Run all passes that are not finished; the result is then a whole checkpoint at `result`.

        `origin` is the model that corrections aim at: the source, or what the last retraining made of it.
        """
        order = list(range(self.checkpoint.spec.layers))
        kept = list(order)                  # the layers of the source that are left
        retrained: int | None = None
        samples = iter(self.samples)
        if not self.journal.entries:
            self._take_from_store()
        for number, one in enumerate(self.sweeps):
            finished = bool(self.journal.find("finished", number))
            if not one.does_over:
                before = number - 1
            view = View.of(self.checkpoint if before < 0 or finished else Checkpoint(self.directory(before)))
            for place, choice in enumerate(one.choices):
                chosen = self._choice(number, place, choice, view)
                order, kept = ([which[index] for index in chosen] for which in (order, kept))
                view = view if finished else view.reordered(chosen)
            if one.training is not None:
                train = self._imitate if one.training.layerwise else self._retrain
                train(number, one.training, next(samples), view, kept)
                retrained, order = number, list(range(len(order)))
            elif one.narrowing is not None:
                if not finished:
                    self._narrow(number, one.narrowing, view)
                retrained, order = number, list(range(len(order)))
            elif not finished:
                source = self.checkpoint if retrained is None else Checkpoint(self.directory(retrained))
                self._layers(number, one, view, View.of(source).reordered(order))
            Writer(self.directory(number)).remove_parts()
            if not finished:
                self._keep_in_store(number, retrained)
            self.sparse = self.sparse or any(edit.name == "sparsity" for edit in one.edits)
            for old in range(number):
                if old != retrained and not self.keep_stages and self.directory(old).exists():
                    shutil.rmtree(self.directory(old))
        Checkpoint(self.result)

    def _key(self, *more: Any, sweeps: int) -> str:
        """What the first so many passes, and more, depend on."""
        begun = {key: self.identity[key] for key in ("source", "corpus", "device", "machine", "tsotsallm")}
        before = [_plain(one.stages) for one in self.sweeps[:sweeps]]
        trained = sum(one.training is not None for one in self.sweeps[:sweeps])
        return key_of([begun, before, self.identity["samples"][:trained], list(more)])

    def _take_from_store(self) -> None:
        """Begin after the last pass that another recipe has in common with this one."""
        for number in reversed(range(len(self.sweeps) - 1) if self.store is not None else ()):
            assert self.store is not None
            piece = self.store.find("pass", self._key(sweeps=number + 1))
            if piece is not None:
                facts = self.store.facts(piece)
                for place in facts["passes"]:
                    link_tree(piece / str(place), self.directory(place))
                for entry in facts["entries"]:
                    self.journal.add(**entry)
                return

    def _keep_in_store(self, number: int, retrained: int | None) -> None:
        """Keep what a pass wrote, and what later passes need of those before it."""
        if self.store is None:
            return
        places = {number} | ({retrained} if retrained is not None else set())
        entries = [entry for entry in self.journal.entries if entry["sweep"] <= number and entry["kind"] != "layer"]
        entries += [entry for entry in self.journal.entries if entry["sweep"] <= number and entry["kind"] == "layer"
                    and "curve" in entry]
        self.store.keep("pass", self._key(sweeps=number + 1), {str(place): self.directory(place) for place in places},
                        {"passes": sorted(places), "entries": entries})

    def _measured(self, key: str) -> dict[str, Any]:
        """What another recipe measured under the same conditions."""
        piece = self.store.find("measures", key) if self.store is not None else None
        return self.store.facts(piece) if piece is not None and self.store is not None else {}

    def _share(self, key: str, measures: Mapping[str, Any]) -> None:
        if self.store is not None and measures:
            self.store.keep("measures", key, {}, dict(measures), anew=len(measures) > len(self._measured(key)))

    def publish_stages(self, kept: Path) -> list[str]:
        """Move kept intermediate models beside the result."""
        if not self.keep_stages:
            return []
        kept.mkdir(exist_ok=True)
        for number in range(len(self.sweeps) - 1):
            directory = self.directory(number)
            if directory.exists():
                target = kept / directory.name
                if target.exists():
                    shutil.rmtree(target)
                publish(directory, target)
        return [str(kept / self.directory(number).name) for number in range(len(self.sweeps) - 1)]

    def _tick(self, number: int, layers: int = 0, layer: Callable[[], int] = lambda: 0) -> Callable[[str, float], None]:
        names = _names(self.sweeps[number], " + ")

        def tick(step: str, share: float) -> None:
            self.progress(Progress(number, len(self.sweeps), names, layer(), layers, step, share))
        return tick

    def _choice(self, number: int, place: int, choice: LayerChoice, view: View) -> list[int]:
        for entry in self.journal.find("choice", number):
            if entry["place"] == place:
                break
        else:
            scratch = self.scratch / "choice"
            tick = self._tick(number)
            shared = self._key(_plain(self.sweeps[number].choices[:place]), choice.measured_by, sweeps=number)
            noted = self._measured(shared) | {
                note["key"]: note["value"] for note in self.journal.find("note", number) if note["place"] == place}

            def note(key: str, value: float, noted: dict[str, Any] = noted) -> None:
                noted[key] = value
                self.journal.add(kind="note", sweep=number, place=place, key=key, value=value)

            made = choice.choose(view, Workplace(self.corpus, scratch, self.device, tick, dict(noted), note))
            self._share(shared, noted)
            if scratch.exists():
                shutil.rmtree(scratch)
            entry = {"order": made.order, "reasons": made.reasons}
            self.journal.add(kind="choice", sweep=number, place=place, **entry)
        self.reasons.append({"stage": choice.name, "order": entry["order"], **entry["reasons"]})
        return list(entry["order"])

    def _retrain(self, number: int, stage: Retraining, samples: Sequence[Samples], view: View, _kept: list[int]) -> None:
        """Train what the stage trains, and write every layer with what became of it."""
        if self.journal.find("finished", number):
            self.trained.append(self.journal.find("trained", number)[-1]["training"])
            return
        chosen = self.journal.find("engine", number)
        name = chosen[0]["engine"] if chosen else self.forecast.sweeps[number].engine
        if not chosen:
            self.journal.add(kind="engine", sweep=number, engine=name)
        workplace = Workplace(self.corpus, self.scratch / "survey", self.device, self._tick(number))
        stage = self._decided(number, 0, stage, lambda: stage.survey(view, workplace))
        trainee = stage.prepare(view, sparse=self.sparse)
        scratch = self.scratch / "training"
        scratch.mkdir(parents=True, exist_ok=True)
        engine: Engine = (ResidentEngine(trainee.base, trainee.adapted, self.device) if name == "resident" else
                          StreamedEngine(trainee.base, trainee.adapted, self.device, scratch))
        curves = stage.train(trainee, samples, engine, self.partial / f"training-{number + 1}", self._tick(number),
                             View.of(self.checkpoint))
        del engine
        shutil.rmtree(scratch)
        self.trained.append({"stage": stage.name, "engine": name, "samples": [
            {"source": some.training.source, "training": len(some.training.windows), "held_out": len(some.held_out.windows),
             "curve": curve.plain()} for some, curve in zip(samples, curves, strict=True)]})
        self.journal.add(kind="trained", sweep=number, training=self.trained[-1])
        output = Output(self.directory(number), self.journal, number)
        for index in range(view.spec.layers):
            output.write(trainee.base, index, trainee.layer(index))
        self._complete(number, output, view)

    def _imitate(self, number: int, stage: Retraining, samples: Sequence[Samples], view: View, kept: list[int]) -> None:
        """Train every layer to give what the original gives at its depth, and write it; one sweep."""
        layers = view.spec.layers
        if self.journal.find("finished", number):
            self.trained.append(self._imitated(number, stage, samples))
            return
        [some] = samples
        output = Output(self.directory(number), self.journal, number)
        current = output.finished_layers
        tick = self._tick(number, layers, lambda: current)
        imitation = stage.imitation(view, View.of(self.checkpoint), kept, some, self.scratch / "original", self.device,
                                    sparse=self.sparse)
        curves: dict[int, Curve] = {}

        def load(index: int) -> dict[str, Tensor]:
            imitation.prepare(index, tick)
            return view.layer(index)

        if current < layers:
            states = self._states(imitation.corpus, view, current)
            for visit in sweep(view, states, observe=False, device=self.device, start=current, load=load, tick=tick,
                               settled=lambda index: output.settled(index, curve=curves[index].plain())):
                current = visit.index
                curves[current], learned = imitation.train(visit, tick)
                output.write(view, current, learned)
            states.remove()
        self.trained.append(self._imitated(number, stage, samples))
        self._complete(number, output, view)

    def _narrow(self, number: int, stage: Neurons, view: View) -> None:
        """Remove neurons and heads of every layer, and write it; one sweep."""
        output = Output(self.directory(number), self.journal, number)
        layers, current = view.spec.layers, output.finished_layers
        tick = self._tick(number, layers, lambda: current)
        if current < layers:
            states = self._states(self.corpus, view, current)
            for visit in sweep(view, states, observe=True, device=self.device, start=current, settled=output.settled,
                               tick=tick):
                current = visit.index
                output.write_dense(current, stage.reshape(visit, view.spec))
            states.remove()
        self._complete(number, output, view, config=stage.spec_after(view.spec).config)

    def _imitated(self, number: int, stage: Retraining, samples: Sequence[Samples]) -> dict[str, Any]:
        return {"stage": stage.name, "engine": "layer by layer", "samples": [
            {"source": samples[0].training.source, "layer": entry["layer"], "curve": entry["curve"]}
            for entry in self.journal.find("layer", number)]}

    def _layers(self, number: int, one: Sweep, view: View, origin: View) -> None:
        """Write every layer of one sweep, then the whole of its checkpoint."""
        surveys = [partial(self._survey, number, one, place, view, origin) for place, _ in enumerate(one.edits)]
        one = replace(one, edits=tuple(self._decided(number, place, edit, survey)
                                       for place, (edit, survey) in enumerate(zip(one.edits, surveys, strict=True))))
        output = Output(self.directory(number), self.journal, number)
        layers = view.spec.layers
        end_grids: dict[str, GgmlGrid] = {}
        for edit in one.edits:
            end_grids |= edit.end_grids(view)
        last = number + 1 == len(self.sweeps)
        first_visit = self._first_visits(origin)
        current = output.finished_layers
        tick = self._tick(number, layers, lambda: current)

        def load(index: int) -> dict[str, Tensor]:
            return view.layer(index) if first_visit[index] == index else output.read(first_visit[index])

        def write(index: int, learned: Callable[[], Learned]) -> None:
            """A shared layer is written at its first visit; before the result its repeats are written out."""
            if first_visit[index] == index:
                output.write(view, index, learned())
            else:
                output.repeat(index, first_visit[index], by_name=last)

        if one.edits and current < layers:
            states = self._states(self.corpus, view, current) if one.observes else None
            originals = self._states(self.corpus, view, current, "original") if one.follows_original else None
            for visit in sweep(view, states, observe=one.observes, device=self.device, start=current, load=load,
                               settled=output.settled, beyond=bool(end_grids), originals=originals,
                               weights=self._weights(number, one, view), tick=tick):
                current = visit.index
                write(current, partial(self._edit, one.edits, visit, view, origin, tick))
            if originals is not None:
                originals.remove()
        for index in range(current, layers if not one.edits else 0):
            current = index
            tick("copying", 0.0)
            write(index, Learned)
            output.settled(index)
        ends: dict[str, Tensor] = {}
        if end_grids:
            outputs = self._states(self.corpus, view, layers).inputs_of(layers) if one.observes else None
            gram = head_gram(view, outputs, self.device) if outputs is not None else None
            ends = packed_ends(view, end_grids, gram, max(getattr(edit, "passes", 0) for edit in one.edits), tick)
        self._complete(number, output, view, first_visit if last else None, ends, end_grids)
        if self.corpus is not None:
            self._states_files(self.corpus, view).remove()

    def _decided(self, number: int, place: int, stage: SomeStage, survey: Callable[[], dict[str, Any]]) -> SomeStage:
        """A stage with what a survey of the model decided, now or before an interruption."""
        if not stage.surveys:
            return stage
        for entry in self.journal.find("decision", number):
            if entry["place"] == place:
                break
        else:
            entry = {"stage": stage.name, "decision": survey()}
            self.journal.add(kind="decision", sweep=number, place=place, **entry)
        return stage.decided(entry["decision"])

    def _survey(self, number: int, one: Sweep, place: int, view: View, origin: View) -> dict[str, Any]:
        """What a stage finds out by itself, or in a sweep through the model as the edits before will leave it."""
        workplace = Workplace(self.corpus, self.scratch / "survey", self.device, self._tick(number))
        found = one.edits[place].survey(view, workplace)
        if found is not None:
            return found
        assert self.corpus is not None
        probe, notes = one.edits[place].probe(sparse=self.sparse or any(
            edit.name == "sparsity" for edit in one.edits[:place]))
        layers, weights = view.spec.layers, self._weights(number, one, view)
        shared = self._key(_plain(one.choices), _plain(one.edits[:place]), one.edits[place].measured_by, sweeps=number)
        if found := self._measured(shared):
            return one.edits[place].decide(found, view)
        for entry in self.journal.find("surveyed", number):
            if entry["place"] == place:
                notes |= entry["notes"]
        current = len({key.partition(".")[0] for key in notes})
        states = self._states(self.corpus, view, current, "survey")
        originals = self._states(self.corpus, view, current, "survey/original") if one.follows_original else None
        tick = self._tick(number, layers, lambda: current)

        def settled(index: int) -> None:
            found = {key: value for key, value in notes.items() if key.startswith(f"{index}.")}
            self.journal.add(kind="surveyed", sweep=number, place=place, notes=found)

        for visit in sweep(view, states, observe=True, device=self.device, start=current, settled=settled, beyond=True,
                           originals=originals, weights=weights, tick=tick) if current < layers else ():
            current = visit.index
            self._edit((*one.edits[:place], probe), visit, view, origin, tick)
        # what attention adds to the residual is what embeddings begin it with
        squares = self.corpus.tokens * float(weights(0).get("self_attn.o_proj.square", 0.0))
        one.edits[place].probe_ends(view, self.corpus, states.inputs_of(layers), notes, squares)
        shutil.rmtree(self.scratch / "survey")
        self._share(shared, notes)
        return one.edits[place].decide(notes, view)

    def _first_visits(self, origin: View) -> list[int]:
        """For each layer the first one that it shares its weights with: itself unless repeats are shared."""
        layers = range(origin.spec.layers)
        if not self.recipe.shared:
            return list(layers)
        seen: dict[int, int] = {}
        return [seen.setdefault(origin.stored(index), index) for index in layers]

    def _weights(self, number: int, one: Sweep, view: View) -> Callable[[int], dict[str, Tensor]]:
        """How much each token counts at each linear of a layer: found before the first layer of a sweep is edited."""
        if not one.weighs_tokens:
            return lambda _index: {}
        assert self.corpus is not None
        kept = self.partial / f"weights-{number + 1}"
        if not self.journal.find("weighed", number):
            shared = self._key(_plain(one.choices), sweeps=number)
            piece = self.store.find("sensitivities", shared) if self.store is not None else None
            if piece is not None:
                shutil.rmtree(kept, ignore_errors=True)
                link_tree(piece / "layers", kept)
            else:
                token_weights(view, self.corpus, kept, self.scratch / "backward", self.device, self._tick(number))
                if self.store is not None:
                    self.store.keep("sensitivities", shared, {"layers": kept}, {})
            self.journal.add(kind="weighed", sweep=number)
        return partial(weights_of, kept)

    def _states(self, corpus: Corpus | None, view: View, start: int, of: str = "") -> TwoStates:
        """The inputs of layer `start`: of a sweep that begins, or of one that was interrupted there."""
        assert corpus is not None
        states = self._states_files(corpus, view, of)
        if start == 0:
            embed_corpus(view, corpus, states.inputs_of(0))
            states.inputs_of(0).flush()
        elif not states.inputs_of(start).path.exists():
            raise ResumeError(f"the hidden states in {self.scratch} are gone; delete {self.partial} and start again")
        return states

    def _states_files(self, corpus: Corpus, view: View, of: str = "") -> TwoStates:
        return TwoStates(self.scratch / of, [len(window) for window in corpus.windows], view.spec.hidden)

    def _edit(self, edits: tuple[LinearEdit, ...], visit: Visit, view: View, origin: View,
              tick: Callable[[str, float], None]) -> Learned:
        """Apply all edits to all linears of a layer; the layer then computes with what will be read back."""
        active = [edit for edit in edits if edit.applies_to(visit.index, view.spec.layers)]
        names = visit.names
        edited: dict[str, Linear] = {}
        if not active:
            return Learned()
        only_factor = sum(edit.uses_factor for edit in active) <= 1
        again = any(edit.observes_again for edit in active)
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
                if self.sparse:
                    linear.mask = linear.reference != 0
                if view.checkpoint is not origin.checkpoint:
                    linear.values = linear.reference.clone()
                    linear.reference = origin.layer_tensor(visit.index, f"{name}.weight").to(self.device)
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
        return Learned(edited)

    def _complete(self, number: int, output: Output, view: View, first_visit: list[int] | None = None,
                  ends: dict[str, Tensor] | None = None, end_grids: Mapping[str, GgmlGrid] | None = None,
                  config: dict[str, Any] | None = None) -> None:
        """Make the pass's checkpoint whole: what is not a layer, config, provenance and model card."""
        output.finish(self.checkpoint, view, first_visit or list(range(view.spec.layers)), ends or {}, end_grids or {},
                      config)
        directory = output.writer.directory
        provenance = {
            "format": 1, "source": self.model_name or self.checkpoint.directory.name,
            "recipe": self.recipe.plain(), "training": [_summary(one) for one in self.trained],
            "notes": self.forecast.warnings, "sweeps_done": f"{number + 1} of {len(self.sweeps)}", "choices": self.reasons,
            "inputs": self.identity, "ancestry": self.checkpoint.provenance,
            "calibration": {"source": self.corpus.source, "windows": len(self.corpus.windows),
                            "tokens": self.corpus.tokens, **self.asked} if self.corpus else None,
            "measures": {"bytes": Checkpoint(directory).weight_bytes,
                         "source_bytes": self.checkpoint.weight_bytes,
                         "source_layers": self.checkpoint.spec.layers}}
        write_json(directory / PROVENANCE, provenance)
        decisions = [entry for sweep in range(number + 1) for entry in self.journal.find("decision", sweep)]
        for count, entry in enumerate(decisions, 1):
            write_json(directory / f"decision-{count}-{entry['stage']}.json", {"stage": entry["stage"], **entry["decision"]})
        for count, trained in enumerate(self.trained, 1):
            write_json(directory / f"training-{count}-{trained['stage']}.json", trained)
        card = model_card(provenance, own_container=output.writer.own_container)
        (directory / "README.md").write_text(card, "utf-8")
        self.journal.add(kind="finished", sweep=number)


def _plain(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    return [{stage.name: stage.fields()} for stage in stages]


def _names(one: Sweep, separator: str) -> str:
    return separator.join(stage.name for stage in one.stages) or "copy"


def _trained(out: Path, count: int) -> list[dict[str, Any]]:
    """What the trainings of a result did and how long they took, from the files with their curves."""
    files = (next(out.glob(f"training-{number}-*.json")) for number in range(1, count + 1))
    return [_summary(json.loads(path.read_text("utf-8")), timed=True) for path in files]


def _summary(trained: dict[str, Any], *, timed: bool = False) -> dict[str, Any]:
    """What a training did, without its curves; seconds only with `timed`, since a repeated run takes others."""
    def of(one: dict[str, Any]) -> dict[str, Any]:
        curve = Curve.from_plain(one["curve"])
        where = {"layer": one["layer"]} if "layer" in one else {"samples": one["training"]}
        return {"source": one["source"], **where, "steps": len(curve.loss), "best_step": curve.best_step,
                "held_out_loss_before": curve.held_out[0][1], "held_out_loss": curve.best, "stopped": curve.stopped,
                **({"elapsed_s": round(curve.elapsed_s, 1)} if timed else {})}
    return trained | {"samples": [of(one) for one in trained["samples"]]}


def _require_finite(linear: Linear, layer: int) -> None:
    if not (linear.stored.finite if linear.stored is not None else bool(torch.isfinite(linear.dense).all())):
        raise NumericsError(f"layer {layer}, {linear.name}: the edit gave values that are not finite; raise damp, or "
                            "calibrate on more text")
