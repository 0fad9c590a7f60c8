"""The candidates of a fit, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from tsotsallm.files import JsonObject
from tsotsallm.fit.files import Stages
from tsotsallm.fit.plans import Corrections, Measured
from tsotsallm.fit.target import Target
from tsotsallm.fit.units import plain_units


@dataclass(frozen=True)
class Round:
    """A candidate: what was expected of it, what it is. Losses in nats a token (KL divergence), bytes of the GGUF file.

    windows  of calibration text that it was made with
    """

    number: int
    structure: str
    recipe: Stages
    windows: int
    predicted: float
    measured: float
    error: float
    predicted_structure: float
    measured_structure: float
    bytes: int
    decode_tokens_per_s: float | None
    predicted_tokens_per_s: float | None
    seconds: float


@dataclass(frozen=True)
class Fitted:
    """The result of a fit."""

    path: Path
    gguf: Path
    target: Target
    best: Round
    rounds: tuple[Round, ...]
    measured: Measured
    corrections: Corrections
    holds: bool
    seconds: float
    evaluation: JsonObject = field(default_factory=dict)

    def plain(self) -> JsonObject:
        """The result as plain data for JSON."""
        return asdict(self) | {"path": str(self.path), "gguf": str(self.gguf), "measured": plain_units(self.measured)}
