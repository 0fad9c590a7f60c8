"""Passes that train: the whole model at once, or every layer by itself."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from dataclasses import replace

from torch import Tensor

from tsotsallm.checkpoint.view import View
from tsotsallm.journal import EngineChosen, LayerWritten, Trained
from tsotsallm.run.passes import Lineage, Pass
from tsotsallm.stages.retraining import Retraining
from tsotsallm.streaming.sweep import SweepOptions
from tsotsallm.training.engines import Engine, ResidentEngine, StreamedEngine
from tsotsallm.training.loop import Curve, TrainedOn, Training


class TrainingPass(Pass):
    """A pass whose stage trains; later corrections aim at what it learned."""

    @property
    def stage(self) -> Retraining:
        """The stage that trains."""
        assert self.sweep.training is not None
        return self.sweep.training

    def recalled(self) -> Lineage:
        """The lineage with the course of the training."""
        return replace(self.lineage, trainings=(*self.lineage.trainings, self.trained())).retrained_by(self.number)

    @abstractmethod
    def trained(self) -> Training:
        """The course of the training, as the journal has it once it is done."""


class Retrained(TrainingPass):
    """Trains low-rank factors of the whole model, in memory or streamed."""

    def write(self) -> None:
        """Train what the stage trains, and write every layer with what became of it."""
        work, samples = self.work, self.work.samples(self.number)
        engine_name = self.engine()
        stage = self.decided(0, self.stage, lambda: self.stage.survey(self.view, self.workplace("survey")))
        trainee = stage.prepare(self.view, sparse=self.lineage.sparse)
        scratch = work.scratch / "training"
        scratch.mkdir(parents=True, exist_ok=True)
        engine: Engine = (ResidentEngine(trainee.base, trainee.adapted, work.device) if engine_name == "resident" else
                          StreamedEngine(trainee.base, trainee.adapted, work.device, scratch))
        curves = stage.train(trainee, samples, engine, work.partial / f"training-{self.number + 1}", self.tick,
                             View.of(work.checkpoint))
        del engine
        shutil.rmtree(scratch)
        work.journal.add(Trained(self.number, Training(stage.name, engine_name, tuple(
            TrainedOn(source=some.training.source, training=len(some.training.windows), held_out=len(some.held_out.windows),
                      curve=curve) for some, curve in zip(samples, curves, strict=True)))))
        self.lineage = self.recalled()
        for index in range(self.view.spec.layers):
            self.output.write(trainee.base, index, trainee.layer(index))
        self.complete()

    def engine(self) -> str:
        """How it trains, resident or streamed: as planned when it began, however much memory is free now."""
        chosen = self.work.journal.find(EngineChosen, self.number)
        if not chosen:
            chosen = [EngineChosen(self.number, self.work.forecast.sweeps[self.number].engine)]
            self.work.journal.add(chosen[0])
        return chosen[0].engine

    def trained(self) -> Training:
        """The last training that the journal has."""
        return self.work.journal.find(Trained, self.number)[-1].training


class Imitating(TrainingPass):
    """Trains every layer to give what the original gives at its depth, and writes it; one sweep."""

    def write(self) -> None:
        """Train and write layer after layer."""
        work, view = self.work, self.view
        [some] = work.samples(self.number)
        self.current = self.output.finished_layers
        imitation = self.stage.imitation(view, View.of(work.checkpoint), list(self.lineage.kept), some,
                                         work.scratch / "original", work.device, sparse=self.lineage.sparse)
        curves: dict[int, Curve] = {}

        def load(index: int) -> dict[str, Tensor]:
            imitation.prepare(index, self.layer_tick)
            return view.layer(index)

        if self.current < view.spec.layers:
            states = self.enter(imitation.corpus)
            for visit in self.visits(states, observe=False, options=SweepOptions(
                    load, lambda index: self.output.settled(index, curves[index]))):
                curves[visit.index], learned = imitation.train(visit, self.layer_tick)
                self.output.write(view, visit.index, learned)
            states.remove()
        self.lineage = self.recalled()
        self.complete()

    def trained(self) -> Training:
        """The course of every layer."""
        [some] = self.work.samples(self.number)
        return Training(self.stage.name, "layer by layer", tuple(
            TrainedOn(source=some.training.source, layer=entry.layer, curve=entry.curve)
            for entry in self.work.journal.find(LayerWritten, self.number) if entry.curve is not None))
