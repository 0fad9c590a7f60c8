"""What every pass of a run has: its inputs, its places on disk, its journal, and what it shares with other recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tsotsallm.checkpoint.card import model_card
from tsotsallm.checkpoint.reader import PROVENANCE, Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.checkpoint.writer import write_json
from tsotsallm.errors import ResumeError
from tsotsallm.journal import Journal
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.planning import Forecast
from tsotsallm.recipe import Recipe, Sweep
from tsotsallm.run.output import Output
from tsotsallm.stages.contract import Stage
from tsotsallm.store import Store, key_of
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.sweep import TwoStates, embed_corpus
from tsotsallm.training.loop import Curve
from tsotsallm.training.samples import Samples

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


class Work:
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
        """Where the last pass writes, before it gets its final name."""
        return self.partial / "result"

    def directory(self, number: int) -> Path:
        """Where a sweep's checkpoint is written."""
        if number + 1 == len(self.sweeps):
            return self.result
        return self.partial / f"{number + 1}-{names_of(self.sweeps[number], '-')}"

    def key(self, *more: Any, sweeps: int) -> str:
        """What the first so many passes, and more, depend on."""
        begun = {key: self.identity[key] for key in ("source", "corpus", "device", "machine", "tsotsallm")}
        before = [plain_stages(one.stages) for one in self.sweeps[:sweeps]]
        trained = sum(one.training is not None for one in self.sweeps[:sweeps])
        return key_of([begun, before, self.identity["samples"][:trained], list(more)])

    def measured(self, key: str) -> dict[str, Any]:
        """What another recipe measured under the same conditions."""
        piece = self.store.find("measures", key) if self.store is not None else None
        return self.store.facts(piece) if piece is not None and self.store is not None else {}

    def share(self, key: str, measures: Mapping[str, Any]) -> None:
        """Keep measurements for other recipes under the same conditions, where a store is used."""
        if self.store is not None and measures:
            self.store.keep("measures", key, {}, dict(measures), replace=len(measures) > len(self.measured(key)))

    def tick(self, number: int, layers: int = 0, layer: Callable[[], int] = lambda: 0) -> Callable[[str, float], None]:
        """What a pass calls to report its progress; `layer` says which of `layers` it is working on."""
        names = names_of(self.sweeps[number], " + ")

        def tick(step: str, share: float) -> None:
            self.progress(Progress(number, len(self.sweeps), names, layer(), layers, step, share))
        return tick

    def decided(self, number: int, place: int, stage: SomeStage, survey: Callable[[], dict[str, Any]]) -> SomeStage:
        """A stage with what a survey of the model decided, now or before an interruption."""
        if not stage.surveys:
            return stage
        for entry in self.journal.find("decision", number):
            if entry["place"] == place:
                break
        else:
            entry = {"stage": stage.name, "decision": survey()}
            self.journal.add(kind="decision", sweep=number, place=place, **entry)
        self.forecast.warnings.extend(entry["decision"].get("notes", []))
        return stage.decided(entry["decision"])

    def states(self, corpus: Corpus | None, view: View, start: int, of: str = "") -> TwoStates:
        """The inputs of layer `start`: of a sweep that begins, or of one that was interrupted there."""
        assert corpus is not None
        states = self.states_files(corpus, view, of)
        if start == 0:
            embed_corpus(view, corpus, states.inputs_of(0))
            states.inputs_of(0).flush()
        elif not states.inputs_of(start).path.exists():
            raise ResumeError(f"the hidden states in {self.scratch} are gone; begin again with --restart")
        return states

    def states_files(self, corpus: Corpus, view: View, of: str = "") -> TwoStates:
        """The two files of hidden states of a corpus; nothing is written."""
        return TwoStates(self.scratch / of, [len(window) for window in corpus.windows], view.spec.hidden)

    def complete(self, number: int, output: Output, view: View, first_visit: list[int] | None = None,
                 ends: dict[str, Tensor] | None = None, end_grids: Mapping[str, GgmlGrid] | None = None,
                 config: dict[str, Any] | None = None) -> None:
        """Make the pass's checkpoint whole: what is not a layer, config, provenance and model card."""
        output.finish(self.checkpoint, view, first_visit or list(range(view.spec.layers)), ends or {}, end_grids or {},
                      config)
        directory = output.writer.directory
        provenance = {
            "format": 1, "source": self.model_name or self.checkpoint.directory.name,
            "recipe": self.recipe.plain(), "training": [summary(one) for one in self.trained],
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
        (directory / "README.md").write_text(card, "utf-8", errors="replace")     # as in write_json
        self.journal.add(kind="finished", sweep=number)


def plain_stages(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Stages as plain data, as a recipe has them."""
    return [{stage.name: stage.fields()} for stage in stages]


def names_of(one: Sweep, separator: str) -> str:
    """The names of a pass's stages in one text; `copy` for a pass without any."""
    return separator.join(stage.name for stage in one.stages) or "copy"


def summary(trained: dict[str, Any], *, timed: bool = False) -> dict[str, Any]:
    """What a training did, without its curves; seconds only with `timed`, since a repeated run takes others."""
    def of(one: dict[str, Any]) -> dict[str, Any]:
        curve = Curve.from_plain(one["curve"])
        where = {"layer": one["layer"]} if "layer" in one else {"samples": one["training"]}
        return {"source": one["source"], **where, "steps": len(curve.loss), "best_step": curve.best_step,
                "held_out_loss_before": curve.held_out[0][1], "held_out_loss": curve.best, "stopped": curve.stopped,
                **({"elapsed_s": round(curve.elapsed_s, 1)} if timed else {})}
    return trained | {"samples": [of(one) for one in trained["samples"]]}
