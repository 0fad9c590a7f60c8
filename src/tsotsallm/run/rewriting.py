"""The pass that gives whole layers new tensors: narrower ones, or one that stands for several."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from tsotsallm.checkpoint.view import View
from tsotsallm.run.output import Output
from tsotsallm.run.work import Work
from tsotsallm.stages.contract import LayerEdit, Workplace
from tsotsallm.streaming.sweep import sweep
from tsotsallm.training.lora import LayerChanges


def rewrite(work: Work, number: int, stage: LayerEdit, view: View, order: Sequence[int]) -> None:
    """Write the layers of `view` that are kept, those that the stage reshapes with their new tensors; one sweep."""
    output = Output(work.directory(number), work.journal, number)
    scratch = work.scratch / "rewriting"
    prepared = stage.prepare(view, order, Workplace(work.corpus, scratch, work.device, work.tick(number)))
    shutil.rmtree(scratch, ignore_errors=True)
    kept = view.reordered(list(order))
    layers, current = kept.spec.layers, output.finished_layers
    tick = work.tick(number, layers, lambda: current)
    if current < layers:
        states = work.states(work.corpus, kept, current) if stage.needs.gram else None
        for visit in sweep(kept, states, observe=stage.needs.gram, device=work.device, start=current, settled=output.settled,
                           tick=tick):
            current = visit.index
            tensors = stage.reshape(visit, kept.spec, prepared)
            if tensors is None:
                output.write(kept, current, LayerChanges())
            else:
                output.write_dense(current, tensors)
        if states is not None:
            states.remove()
    work.complete(number, output, kept, config=stage.spec_after(kept.spec).config)
