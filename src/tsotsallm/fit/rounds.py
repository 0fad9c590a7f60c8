"""The candidates of a fit, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from tsotsallm.evaluation.conversations import Answered
from tsotsallm.files import JsonObject
from tsotsallm.fit.files import Stages
from tsotsallm.fit.notes import plain_units
from tsotsallm.fit.plans import Corrections, Measured
from tsotsallm.fit.target import Target


@dataclass(frozen=True)
class Round:
    """A candidate: what was expected of it, what it is. Losses in nats a token (KL divergence), bytes of the GGUF file.

    windows  of calibration text that it was made with
    tuned    whether it is an earlier candidate that learned its scales and norms; `predicted` is then what that one lost
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
    tuned: bool = False

    @property
    def name(self) -> str:
        """The structure, and whether it is tuned."""
        return self.structure + ", tuned" * self.tuned


@dataclass(frozen=True)
class Fitted:
    """The result of a fit.

    evaluation    on the text that candidates were compared on
    answered      how far it is from the original on its answers, where it was compared on some
    in_llama      its file on that text in llama.cpp, which rounds activations too; None without llama.cpp
    tokens_per_s  new tokens a second in llama.cpp on this machine; None without it
    before        bytes of the original's weights
    """

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
    answered: Answered | None = None
    in_llama: JsonObject | None = None
    tokens_per_s: float | None = None
    before: int = 0

    def plain(self) -> JsonObject:
        """The result as plain data for JSON."""
        answered = None if self.answered is None else self.answered.plain()
        return asdict(self) | {"path": str(self.path), "gguf": str(self.gguf), "answered": answered,
                               "measured": plain_units(self.measured)}
