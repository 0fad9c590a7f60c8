"""A pass of a run: from the model that the passes before it left to a whole checkpoint, journaled and resumed."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from torch import Tensor

from tsotsallm.checkpoint.card import model_card
from tsotsallm.checkpoint.provenance import Calibrated, ChoiceMade, Measures, Provenance
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.source import PROVENANCE
from tsotsallm.checkpoint.view import View
from tsotsallm.checkpoint.writer import Writer, write_json
from tsotsallm.errors import ResumeError
from tsotsallm.journal import Chosen, Decided, Finished, Noted
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.run.output import Output
from tsotsallm.run.work import Progress, Work, names_of, plain_stages
from tsotsallm.stages.contract import LayerChoice, LayerEdit, Stage, Workplace
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.sweep import SweepOptions, TwoStates, Visit, embed_corpus, sweep
from tsotsallm.training.loop import Training

SomeStage = TypeVar("SomeStage", bound=Stage)


@dataclass(frozen=True)
class Lineage:
    """What the passes so far made of the source.

    kept       the layers of the source that are left, in order
    order      the same layers by their places in the model that corrections aim at: the source, or what was last retrained
    retrained  the pass that retrained or reshaped the layers last; None where none did
    before     the pass whose checkpoint the next one begins with; None for the source
    sparse     whether the model's zeros were made on purpose
    """

    kept: tuple[int, ...]
    order: tuple[int, ...]
    retrained: int | None = None
    before: int | None = None
    sparse: bool = False
    choices: tuple[ChoiceMade, ...] = ()
    trainings: tuple[Training, ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Lineage:
        """The lineage before the first pass."""
        layers = tuple(range(checkpoint.spec.layers))
        return cls(layers, layers, sparse=checkpoint.is_sparse)

    def of_layers(self, chosen: Sequence[int]) -> Lineage:
        """The lineage with only the layers at the places `chosen`, in that order."""
        kept, order = (tuple(which[place] for place in chosen) for which in (self.kept, self.order))
        return replace(self, kept=kept, order=order)

    def retrained_by(self, number: int) -> Lineage:
        """The lineage after pass `number` gave all layers values that later corrections aim at."""
        return replace(self, retrained=number, order=tuple(range(len(self.kept))))


class Pass(ABC):
    """One pass: `run` brings it to its end, whatever an interrupted attempt left.

    number   its place among the run's passes, from 0
    lineage  what the model comes from, with the choices and trainings of this pass once they are made
    view     the layers that it works on; of a finished pass only a stand-in
    current  the layer that it is working on
    """

    def __init__(self, work: Work, number: int, lineage: Lineage) -> None:
        self.work, self.number, self.sweep = work, number, work.sweeps[number]
        self.directory = work.directory(number)
        self.finished = bool(work.journal.find(Finished, number))
        if not self.sweep.does_over:
            lineage = replace(lineage, before=number - 1 if number else None)
        self.lineage, self.current = lineage, 0
        before = None if self.finished else lineage.before
        self.view = View.of(work.checkpoint if before is None else Checkpoint(work.directory(before)))

    def run(self) -> Lineage:
        """Write the pass's checkpoint, unless an earlier attempt finished it; returns the lineage of what it wrote."""
        for place, choice in enumerate(self.sweep.choices):
            chosen = self.chosen(place, choice)
            self.lineage = self.lineage.of_layers(chosen)
            if not self.finished:
                self.view = self.view.reordered(chosen)
        if self.finished:
            self.lineage = self.recalled()
        else:
            self.write()
        Writer(self.directory).remove_parts()
        sparse = self.lineage.sparse or any(edit.leaves_zeros for edit in self.sweep.edits)
        return replace(self.lineage, sparse=sparse)

    @abstractmethod
    def write(self) -> None:
        """Write the checkpoint, from the layer on that an interrupted attempt came to, and bring the lineage up to date."""

    def recalled(self) -> Lineage:
        """The lineage of what the pass wrote, from the journal, once it has all of it."""
        return self.lineage

    # -- what stages are given ------------------------------------------------------------------------------------

    def tick(self, step: str, share: float) -> None:
        """Report progress of the pass as a whole."""
        self._report(0, 0, step, share)

    def layer_tick(self, step: str, share: float) -> None:
        """Report progress inside the current layer."""
        self._report(self.current, self.view.spec.layers, step, share)

    def _report(self, layer: int, layers: int, step: str, share: float) -> None:
        self.work.options.progress(Progress(self.number, len(self.work.sweeps), names_of(self.sweep, " + "), layer, layers,
                                            step, share))

    def workplace(self, folder: str) -> Workplace:
        """What a stage works with besides the model, with a scratch folder of that name."""
        return Workplace(self.work.corpus, self.work.scratch / folder, self.work.device, self.tick)

    @cached_property
    def output(self) -> Output:
        """The checkpoint being written, with the layers that an interrupted attempt finished."""
        return Output(self.directory, self.work.journal, self.number)

    @cached_property
    def origin(self) -> View:
        """The model that corrections aim at, in the order of this pass's layers."""
        retrained = self.lineage.retrained
        aim = self.work.checkpoint if retrained is None else Checkpoint(self.work.directory(retrained))
        return View.of(aim).reordered(self.lineage.order)

    # -- decisions ------------------------------------------------------------------------------------------------

    def chosen(self, place: int, choice: LayerChoice | LayerEdit) -> tuple[int, ...]:
        """The order of layers that a choice makes of the view, now or before an interruption; the lineage notes it."""
        work = self.work
        found = work.journal.find(Chosen, self.number, place)
        if not found:
            shared = work.key(plain_stages(self.sweep.choices[:place]), choice.measured_by, sweeps=self.number)
            noted = {key: value for key, value in work.measured(shared).items() if isinstance(value, float)}
            noted |= {note.key: note.value for note in work.journal.find(Noted, self.number, place)}

            def note(key: str, value: float) -> None:
                noted[key] = value
                work.journal.add(Noted(self.number, place, key, value))

            workplace = replace(self.workplace("choice"), noted=dict(noted), note=note)
            made = choice.choose(self.view, workplace)
            work.share(shared, noted)
            shutil.rmtree(workplace.scratch, ignore_errors=True)
            found = [Chosen(self.number, place, tuple(made.order), made.reasons)]
            work.journal.add(found[0])
        order, reasons = found[0].order, found[0].reasons
        if isinstance(choice, LayerChoice) or reasons:
            self.lineage = replace(self.lineage, choices=(*self.lineage.choices, ChoiceMade(choice.name, order, reasons)))
        return order

    def decided(self, place: int, stage: SomeStage, survey: Callable[[], dict[str, object]]) -> SomeStage:
        """A stage with what a survey of the model decided, now or before an interruption."""
        if not stage.surveys:
            return stage
        found = self.work.journal.find(Decided, self.number, place)
        if not found:
            found = [Decided(self.number, place, stage.name, survey())]
            self.work.journal.add(found[0])
        return stage.decided(found[0].decision)

    # -- layers ---------------------------------------------------------------------------------------------------

    def states_of(self, corpus: Corpus | None, of: str = "") -> TwoStates:
        """The two files of hidden states of a corpus, in a scratch folder `of` that name; neither is written or read."""
        assert corpus is not None
        return TwoStates(self.work.scratch / of, [len(window) for window in corpus.windows], self.view.spec.hidden)

    def begin(self, corpus: Corpus | None, of: str = "") -> TwoStates:
        """Write the inputs of layer 0, the embeddings of the corpus."""
        states = self.states_of(corpus, of)
        assert corpus is not None
        embed_corpus(self.view, corpus, states.inputs_of(0)).flush()
        return states

    def resume(self, corpus: Corpus | None, of: str = "") -> TwoStates:
        """Open the inputs of the current layer, where a sweep was interrupted; raises ResumeError where they are gone."""
        states = self.states_of(corpus, of)
        if not states.inputs_of(self.current).exists():
            raise ResumeError(f"the hidden states in {self.work.scratch} are gone; begin again with --restart")
        return states

    def enter(self, corpus: Corpus | None, of: str = "") -> TwoStates:
        """Begin a sweep at layer 0, or resume one at the current layer."""
        return self.begin(corpus, of) if self.current == 0 else self.resume(corpus, of)

    def visits(self, states: TwoStates | None, *, observe: bool, options: SweepOptions) -> Iterator[Visit]:
        """Visit the layers of the view from the current one on, which moves along; see `streaming.sweep`."""
        for visit in sweep(self.view, states, observe=observe, device=self.work.device, start=self.current,
                           tick=self.layer_tick, options=options):
            self.current = visit.index
            yield visit

    # -- the whole checkpoint -------------------------------------------------------------------------------------

    def complete(self, first_visit: list[int] | None = None, ends: dict[str, Tensor] | None = None,
                 end_grids: Mapping[str, GgmlGrid] | None = None, config: Mapping[str, object] | None = None) -> None:
        """Make the checkpoint whole: what is not a layer, config, provenance, decisions, curves and model card.

        `first_visit` says for each layer which one holds its weights; `ends` stand in place of the matrices that `end_grids`
        names, `config` in place of the view's.
        """
        work, output, directory, made = self.work, self.output, self.directory, self.number + 1
        output.finish(work.checkpoint, self.view, first_visit or list(range(self.view.spec.layers)), ends or {},
                      end_grids or {}, config)
        written = Checkpoint(directory)
        provenance = Provenance(
            source=work.inputs.name or work.checkpoint.directory.name, recipe=work.identity.recipe,
            training=tuple(one.summary() for one in self.lineage.trainings), notes=tuple(work.notes(made)),
            sweeps_done=f"{made} of {len(work.sweeps)}", choices=self.lineage.choices, inputs=work.identity,
            ancestry=work.checkpoint.provenance, calibration=self._calibrated(),
            measures=Measures(written.weight_bytes, work.checkpoint.weight_bytes, work.checkpoint.spec.layers,
                              work.checkpoint.source.lossy or None))
        write_json(directory / PROVENANCE, provenance.plain())
        for count, one in enumerate(work.decisions(made), 1):
            write_json(directory / f"decision-{count}-{one.stage}.json", {"stage": one.stage, **one.decision})
        for count, training in enumerate(self.lineage.trainings, 1):
            write_json(directory / f"training-{count}-{training.stage}.json", training.plain())
        card = model_card(provenance, own_container=output.writer.own_container,
                          packed=written.spec.quantization is not None)
        (directory / "README.md").write_text(card, "utf-8", errors="replace")     # as in write_json
        work.journal.add(Finished(self.number))

    def _calibrated(self) -> Calibrated | None:
        corpus, asked = self.work.corpus, self.work.options
        given = None if asked.calibration is None else str(asked.calibration)
        return None if corpus is None else Calibrated(corpus.source, len(corpus.windows), corpus.tokens, given, asked.window,
                                                      asked.seed)
