"""Passes that train: the whole model at once, or every layer by itself."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tsotsallm.checkpoint.view import View
from tsotsallm.run.output import Output
from tsotsallm.run.work import Work
from tsotsallm.stages.contract import Workplace
from tsotsallm.stages.retraining import Retraining
from tsotsallm.streaming.sweep import sweep
from tsotsallm.training.engines import Engine, ResidentEngine, StreamedEngine
from tsotsallm.training.loop import Curve
from tsotsallm.training.samples import Samples


def retrain(work: Work, number: int, stage: Retraining, samples: Sequence[Samples], view: View, _kept: list[int]) -> None:
    """Train what the stage trains, and write every layer with what became of it."""
    if work.journal.find("finished", number):
        work.trained.append(work.journal.find("trained", number)[-1]["training"])
        return
    chosen = work.journal.find("engine", number)
    name = chosen[0]["engine"] if chosen else work.forecast.sweeps[number].engine
    if not chosen:
        work.journal.add(kind="engine", sweep=number, engine=name)
    workplace = Workplace(work.corpus, work.scratch / "survey", work.device, work.tick(number))
    stage = work.decided(number, 0, stage, lambda: stage.survey(view, workplace))
    trainee = stage.prepare(view, sparse=work.sparse)
    scratch = work.scratch / "training"
    scratch.mkdir(parents=True, exist_ok=True)
    engine: Engine = (ResidentEngine(trainee.base, trainee.adapted, work.device) if name == "resident" else
                      StreamedEngine(trainee.base, trainee.adapted, work.device, scratch))
    curves = stage.train(trainee, samples, engine, work.partial / f"training-{number + 1}", work.tick(number),
                         View.of(work.checkpoint))
    del engine
    shutil.rmtree(scratch)
    work.trained.append({"stage": stage.name, "engine": name, "samples": [
        {"source": some.training.source, "training": len(some.training.windows), "held_out": len(some.held_out.windows),
         "curve": curve.plain()} for some, curve in zip(samples, curves, strict=True)]})
    work.journal.add(kind="trained", sweep=number, training=work.trained[-1])
    output = Output(work.directory(number), work.journal, number)
    for index in range(view.spec.layers):
        output.write(trainee.base, index, trainee.layer(index))
    work.complete(number, output, view)


def imitate(work: Work, number: int, stage: Retraining, samples: Sequence[Samples], view: View, kept: list[int]) -> None:
    """Train every layer to give what the original gives at its depth, and write it; one sweep."""
    layers = view.spec.layers
    if work.journal.find("finished", number):
        work.trained.append(_imitated(work, number, stage, samples))
        return
    [some] = samples
    output = Output(work.directory(number), work.journal, number)
    current = output.finished_layers
    tick = work.tick(number, layers, lambda: current)
    imitation = stage.imitation(view, View.of(work.checkpoint), kept, some, work.scratch / "original", work.device,
                                sparse=work.sparse)
    curves: dict[int, Curve] = {}

    def load(index: int) -> dict[str, Tensor]:
        imitation.prepare(index, tick)
        return view.layer(index)

    if current < layers:
        states = work.states(imitation.corpus, view, current)
        for visit in sweep(view, states, observe=False, device=work.device, start=current, load=load, tick=tick,
                           settled=lambda index: output.settled(index, curve=curves[index].plain())):
            current = visit.index
            curves[current], learned = imitation.train(visit, tick)
            output.write(view, current, learned)
        states.remove()
    work.trained.append(_imitated(work, number, stage, samples))
    work.complete(number, output, view)


def _imitated(work: Work, number: int, stage: Retraining, samples: Sequence[Samples]) -> dict[str, Any]:
    return {"stage": stage.name, "engine": "layer by layer", "samples": [
        {"source": samples[0].training.source, "layer": entry["layer"], "curve": entry["curve"]}
        for entry in work.journal.find("layer", number)]}
