"""How long passes really take on this computer: kept of every pass that a run finished, asked by the next forecast."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tsotsallm.errors import TsotsallmError
from tsotsallm.files import parse_json
from tsotsallm.machine import cache_root, compiler
from tsotsallm.records import Record
from tsotsallm.timing import OF_OPERATIONS

KEPT = 7
"""How many passes of a kind are remembered."""
LEAST_FLOOR_S = 1.0
"""Passes of fewer operations say little about longer ones."""
ELSEWHERE_RATIO = 1.3
ELSEWHERE_S_PER_WEIGHT = {"compiled": 7e-7, "compensated": 3e-6, "plain": 5e-8}
"""What passes took on two cores of a server (docs/LOG.md, "What a forecast is worth"), until one of a kind was run here."""


@dataclass(frozen=True)
class Kind(Record):
    """What decides how far a pass is above its floor.

    stages   of the pass, as one line
    needs    what they need, in words; stages of other names with the same needs are the next best
    threads  that it computes on
    trains   whether it trains: all of its time then grows with its operations
    device   that it computes on
    """

    stages: str
    needs: str
    threads: int
    trains: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Measured(Record):
    """What a pass took: seconds that grow with its operations as a ratio to their floor, all others for every weight."""

    kind: Kind
    ratio: float
    s_per_weight: float

    @classmethod
    def of(cls, kind: Kind, floor_s: float, weights: int, seconds: Mapping[str, float]) -> Measured | None:
        """The measure of a pass over `weights` weights by the seconds of its parts; None where it was too short."""
        whole = sum(seconds.values())
        growing = whole if kind.trains else sum(seconds.get(part, 0.0) for part in OF_OPERATIONS)
        if floor_s == 0 and not kind.trains:
            return cls(kind, 1.0, whole / weights)
        return cls(kind, growing / floor_s, (whole - growing) / weights) if floor_s >= LEAST_FLOOR_S else None


@dataclass(frozen=True)
class Expected:
    """How long a pass is likely to take, in seconds, and how many passes like it on this computer that comes from."""

    seconds: float
    runs: int


def remember(measured: Measured) -> None:
    """Keep a measure beside the last ones of its kind; nothing is kept where the cache cannot be written."""
    others = _remembered()
    alike = [one for one in others if one.kind == measured.kind][-KEPT + 1:]
    kept = [*(one for one in others if one.kind != measured.kind), *alike, measured]
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        draft.write_text(json.dumps([one.plain() for one in kept], indent=1), "utf-8")
        draft.replace(path)
    except OSError:
        return      # a forecast without measures says so


def expected(kind: Kind, floor_s: float, weights: int) -> Expected:
    """The time of a pass by the median of passes alike here: of the same stages, or else with the same needs."""
    here = [one for one in _remembered() if (one.kind.threads, one.kind.trains, one.kind.device) == (
        kind.threads, kind.trains, kind.device)]
    alike = ([one for one in here if one.kind.stages == kind.stages]
             or [one for one in here if one.kind.needs == kind.needs])
    if not alike:
        compensated = ("compiled" if compiler() is not None else "compensated") if "factor" in kind.needs else "plain"
        return Expected(ELSEWHERE_RATIO * floor_s + ELSEWHERE_S_PER_WEIGHT[compensated] * weights, 0)
    ratio, s_per_weight = (statistics.median(values) for values in zip(
        *((one.ratio, one.s_per_weight) for one in alike), strict=True))
    return Expected(ratio * floor_s + s_per_weight * weights, len(alike))


def _path() -> Path:
    return cache_root() / "pace.json"


def _remembered() -> list[Measured]:
    try:
        plain = parse_json(_path().read_text("utf-8"), str(_path()), TsotsallmError)
        return [Measured.parsed(one) for one in plain]
    except (OSError, ValueError, TypeError, TsotsallmError):
        return []   # there is none yet, or it is damaged: the next run writes it anew
