"""The pass that takes neurons and heads out of every layer."""

from __future__ import annotations

from tsotsallm.checkpoint.view import View
from tsotsallm.run.output import Output
from tsotsallm.run.work import Work
from tsotsallm.stages.neurons import Neurons
from tsotsallm.streaming.sweep import sweep


def narrow(work: Work, number: int, stage: Neurons, view: View) -> None:
    """Remove neurons and heads of every layer, and write it; one sweep."""
    output = Output(work.directory(number), work.journal, number)
    layers, current = view.spec.layers, output.finished_layers
    tick = work.tick(number, layers, lambda: current)
    if current < layers:
        states = work.states(work.corpus, view, current)
        for visit in sweep(view, states, observe=True, device=work.device, start=current, settled=output.settled,
                           tick=tick):
            current = visit.index
            output.write_dense(current, stage.reshape(visit, view.spec))
        states.remove()
    work.complete(number, output, view, config=stage.spec_after(view.spec).config)
