"""The pass that gives whole layers new tensors: narrower ones, or one that stands for several."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from tsotsallm.run.passes import Lineage, Pass
from tsotsallm.stages.contract import LayerEdit
from tsotsallm.streaming.sweep import SweepOptions
from tsotsallm.training.trainee import LayerChanges


class Rewriting(Pass):
    """Writes the layers that a stage keeps, those that it reshapes with their new tensors; one sweep."""

    @property
    def stage(self) -> LayerEdit:
        """The stage that reshapes layers."""
        assert self.sweep.rewriting is not None
        return self.sweep.rewriting

    def recalled(self) -> Lineage:
        """The lineage with the layers that the stage kept; later corrections aim at their new tensors."""
        return self.after(self.chosen(len(self.sweep.choices), self.stage))

    def after(self, order: Sequence[int]) -> Lineage:
        """The lineage of what is written where the stage keeps the layers `order`."""
        return self.lineage.of_layers(order).retrained_by(self.number)

    def write(self) -> None:
        """Prepare what the stage needs of the whole model, then write layer after layer."""
        stage, workplace = self.stage, self.workplace("rewriting")
        order = self.chosen(len(self.sweep.choices), stage)
        prepared = stage.prepare(self.view, order, workplace)
        shutil.rmtree(workplace.scratch, ignore_errors=True)
        self.view = kept = self.view.reordered(order)
        self.current = self.output.finished_layers
        if self.current < kept.spec.layers:
            states = self.enter(self.work.corpus) if stage.needs.gram else None
            for visit in self.visits(states, observe=stage.needs.gram, options=SweepOptions(settled=self.output.settled)):
                tensors = stage.reshape(visit, kept.spec, prepared)
                if tensors is None:
                    self.output.write(kept, visit.index, LayerChanges())
                else:
                    self.output.write_dense(visit.index, tensors)
            if states is not None:
                states.remove()
        self.complete(config=stage.spec_after(kept.spec).config)
        self.lineage = self.after(order)
