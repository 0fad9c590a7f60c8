"""What every pass of a run has: its inputs and options, its places on disk, its journal, and what it shares with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from tsotsallm.checkpoint.provenance import Identity
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.writer import partial_path
from tsotsallm.errors import HubError, ResumeError
from tsotsallm.files import read_json
from tsotsallm.journal import Decided, Journal, scratch_path
from tsotsallm.planning import Forecast
from tsotsallm.recipe import Recipe, Sweep
from tsotsallm.records import Record
from tsotsallm.remote.names import hub_name
from tsotsallm.stages.contract import Stage
from tsotsallm.store import Store, key_of
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.training.samples import Samples


@dataclass(frozen=True)
class Progress:
    """What a run is doing now; `share` of the layer's current step is done, or of the whole pass where `layers` is 0.

    Before the first pass, while the model writes the text that it is calibrated on, `sweep` is -1.
    """

    sweep: int
    sweeps: int
    stages: str
    layer: int
    layers: int
    step: str
    share: float


@dataclass(frozen=True)
class CompressOptions:
    """How a model is compressed.

    calibration      text file, directory of texts, .jsonl of conversations, hub data set, `self` (what the model writes),
                     or several with shares; None: the embedded world's, or the hub's C4
    windows, window  number of calibration windows, and their length in tokens, drawn by `seed`; None: 1024, or the model's
                     context where that is shorter
    device           "cpu", or "cuda" where there is a GPU
    scratch          directory for hidden states; None: with the unfinished work
    keep_stages      keep the model after every stage, in OUT-stages
    force            start although memory or disk seem too small
    restart          delete the unfinished work of an earlier attempt instead of continuing it
    cache_bytes      bound of what is on disk of a model on the hub while it is streamed; None: what the recipe needs,
                     deleted at the end
    store            work that recipes have in common is taken from there; the result is the same, byte for byte
    progress         called with what the run is doing
    say              called, before anything is written, with what the user should know of the result
    """

    calibration: str | Path | None = None
    windows: int = 32
    window: int | None = None
    seed: int = 0
    device: str = "cpu"
    scratch: str | Path | None = None
    keep_stages: bool = False
    force: bool = False
    restart: bool = False
    cache_bytes: int | None = None
    store: Store | None = None
    progress: Callable[[Progress], None] = lambda _progress: None
    say: Callable[[str], None] = lambda _line: None


class CompressKeywords(TypedDict, total=False):
    """The fields of CompressOptions, as keywords."""

    calibration: str | Path | None
    windows: int
    window: int | None
    seed: int
    device: str
    scratch: str | Path | None
    keep_stages: bool
    force: bool
    restart: bool
    cache_bytes: int | None
    store: Store | None
    progress: Callable[[Progress], None]
    say: Callable[[str], None]


PIN = "hub.json"


@dataclass(frozen=True)
class Pin(Record):
    """The commit at which a model on the hub was begun, so that a resumed run reads the same.

    given   its name as the user gave it
    pinned  with the commit
    """

    given: str
    pinned: str

    @classmethod
    def of(cls, model: str | Path, partial: Path) -> Pin | None:
        """What unfinished work of the same model in a directory noted; None where there is none."""
        name = hub_name(model)
        try:
            found = read_json(partial / PIN, ResumeError) if name is not None else None
            pin = None if found is None else cls.parsed(found)
            if pin is not None:
                hub_name(pin.pinned)
        except (OSError, HubError, ResumeError, ValueError):    # nothing there, or damaged: hashes then tell what differs
            return None
        return pin if pin is not None and pin.given == str(name) else None


@dataclass(frozen=True)
class Inputs:
    """What a run works on, read and checked.

    recipe   checked against the checkpoint, and resolved
    corpus   the calibration text; None where no stage needs any
    samples  those of every stage that trains, in order
    name     what the user calls the model
    pin      of a model on the hub
    """

    checkpoint: Checkpoint
    recipe: Recipe
    corpus: Corpus | None
    samples: Sequence[Sequence[Samples]]
    name: str
    pin: Pin | None = None


class Work:
    """One run while it goes on."""

    def __init__(self, inputs: Inputs, out: Path, forecast: Forecast, options: CompressOptions, identity: Identity) -> None:
        self.inputs, self.forecast, self.options, self.identity = inputs, forecast, options, identity
        self.checkpoint, self.recipe, self.corpus = inputs.checkpoint, inputs.recipe, inputs.corpus
        self.partial, self.scratch = partial_path(out), scratch_path(out, options.scratch)
        self.device = torch.device(options.device)
        self.journal = Journal(self.partial / "journal.jsonl")
        self.resumed = bool(self.journal.entries)
        # repeats are written in two ways there
        self.store = options.store if not (self.recipe.shared or options.keep_stages) else None
        self.sweeps = self.recipe.sweeps(one_stage_each=options.keep_stages)

    @property
    def result(self) -> Path:
        """Where the last pass writes, before it gets its final name."""
        return self.partial / "result"

    def directory(self, number: int) -> Path:
        """Where a sweep's checkpoint is written."""
        if number + 1 == len(self.sweeps):
            return self.result
        return self.partial / f"{number + 1}-{names_of(self.sweeps[number], '-')}"

    def samples(self, number: int) -> Sequence[Samples]:
        """The samples of sweep `number`, which trains."""
        return self.inputs.samples[sum(one.training is not None for one in self.sweeps[:number])]

    def decisions(self, sweeps: int) -> list[Decided]:
        """What stages of the first `sweeps` passes decided, in order."""
        return [entry for number in range(sweeps) for entry in self.journal.find(Decided, number)]

    def notes(self, sweeps: int) -> list[str]:
        """What a user should know: from the forecast, and from the decisions of the first `sweeps` passes."""
        decided = [notes for one in self.decisions(sweeps) if isinstance(notes := one.decision.get("notes"), (list, tuple))]
        return [*self.forecast.warnings, *(str(note) for notes in decided for note in notes)]

    def key(self, *more: object, sweeps: int) -> str:
        """What the first `sweeps` passes, and more, depend on."""
        identity = self.identity.plain()
        begun = {key: identity[key] for key in ("source", "corpus", "device", "machine", "tsotsallm")}
        before = [plain_stages(one.stages) for one in self.sweeps[:sweeps]]
        trained = sum(one.training is not None for one in self.sweeps[:sweeps])
        return key_of([begun, before, self.identity.samples[:trained], list(more)])

    def measured(self, key: str) -> dict[str, object]:
        """What another recipe measured under the same conditions."""
        piece = self.store.find("measures", key) if self.store is not None else None
        return self.store.facts(piece) if piece is not None and self.store is not None else {}

    def share(self, key: str, measures: Mapping[str, object]) -> None:
        """Keep measurements for other recipes under the same conditions, where a store is used."""
        if self.store is not None and measures:
            self.store.keep("measures", key, {}, dict(measures), replace=len(measures) > len(self.measured(key)))


def plain_stages(stages: Sequence[Stage]) -> list[dict[str, dict[str, object]]]:
    """Stages as plain data, as a recipe has them."""
    return [{stage.name: stage.fields()} for stage in stages]


def names_of(one: Sweep, separator: str) -> str:
    """The names of a pass's stages in one text; `copy` for a pass without any."""
    return separator.join(stage.name for stage in one.stages) or "copy"
