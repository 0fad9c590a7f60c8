"""What a result says of its making (tsotsallm.json): recipe, inputs with their hashes, choices, trainings, measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from tsotsallm.records import Brief, Record

Stages = tuple[dict[str, dict[str, object]], ...]
"""A recipe as plain data: for every stage its name -> its options."""


@dataclass(frozen=True)
class Shard(Record):
    """A weight file that went in: its size, and the SHA-256 of its header and of its last 64 KiB."""

    bytes: int
    sha256_of_ends: str


@dataclass(frozen=True)
class Source(Brief):
    """The hashes of a checkpoint that went in; `tokens_sha256` where its vocabulary was reduced on reading."""

    config_sha256: str
    shards: dict[str, Shard]
    tokens_sha256: str | None = None


@dataclass(frozen=True)
class Identity(Record):
    """Everything that decides the bytes of a result.

    corpus, samples  hashes of the calibration text, and of the samples of every stage that trains
    machine          versions, threads and processor, which decide the last bit
    """

    source: Source
    recipe: Stages
    keep_stages: bool
    corpus: str | None
    samples: tuple[tuple[str, ...], ...]
    device: str
    machine: dict[str, object]
    tsotsallm: str


@dataclass(frozen=True)
class ChoiceMade(Brief):
    """The layers that a stage kept, in order; `reasons` are what it chose by, in keys of its own."""

    stage: str = ""
    order: tuple[int, ...] | None = None
    reasons: dict[str, object] = field(default_factory=dict)

    @classmethod
    def parsed(cls, plain: object) -> Self:
        """The choice, with all keys but `stage` and `order` as its reasons; raises ValueError as `Record.parsed` does."""
        if isinstance(plain, Mapping):
            plain = {**plain, "reasons": {key: plain[key] for key in plain if key not in ("stage", "order")}}
        return super().parsed(plain)

    def plain(self) -> dict[str, object]:
        """The choice as JSON's plain data, its reasons beside the order."""
        plain = super().plain()
        del plain["reasons"]
        return plain | self.reasons


@dataclass(frozen=True, kw_only=True)
class SampleSummary(Brief):
    """What training on one source came to, or the training of one layer by itself; losses in nats per token.

    samples    samples trained on
    layer      the layer that was trained, where layers were one after another
    elapsed_s  seconds; not in a provenance, since a repeated run takes others
    """

    source: str
    layer: int | None = None
    samples: int | None = None
    steps: int
    best_step: int
    held_out_loss_before: float
    held_out_loss: float
    stopped: str
    elapsed_s: float | None = None


@dataclass(frozen=True)
class TrainingSummary(Record):
    """What a stage that trains did, and how (`engine`: resident, streamed, layer by layer)."""

    stage: str
    engine: str
    samples: tuple[SampleSummary, ...]


@dataclass(frozen=True)
class Calibrated(Brief):
    """The calibration text that was used, and how it was asked for (`given`, `window`, `seed`), which older results lack."""

    source: str
    windows: int
    tokens: int
    given: str | None
    window: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Measures(Brief):
    """Bytes of the weights of a result and of its source, and the source's layers, which older results lack.

    source_types  types and bits a weight of a source that was quantised before
    """

    bytes: int = 0
    source_bytes: int = 0
    source_layers: int | None = None
    source_types: str | None = None


@dataclass(frozen=True, kw_only=True)
class Provenance(Record):
    """The content of tsotsallm.json; `ancestry` is that of the source, where it was a result itself."""

    format: int = 1
    source: str = ""
    recipe: Stages
    training: tuple[TrainingSummary, ...] = ()
    notes: tuple[str, ...] = ()
    sweeps_done: str = ""
    choices: tuple[ChoiceMade, ...]
    inputs: Identity | None
    ancestry: Provenance | None
    calibration: Calibrated | None
    measures: Measures

    def __post_init__(self) -> None:
        if not all(len(stage) == 1 for stage in self.recipe):
            raise ValueError("a stage of its recipe has not one name")

    @property
    def generations(self) -> list[Provenance]:
        """This provenance and those of its ancestors, the first ancestor last."""
        return [self, *(self.ancestry.generations if self.ancestry is not None else ())]
