"""Options that many functions share: one frozen object, or keywords (`records.amended`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from tsotsallm.streaming.sweep import Tick, silent


@dataclass(frozen=True)
class RunOptions:
    """Where a computation runs and who hears of its progress.

    device   "cpu", or "cuda" where there is a GPU
    scratch  directory for hidden states; None takes the system's temporary one
    tick     called with the name of a step and the share of it that is done, 0 to 1
    """

    device: str = "cpu"
    scratch: str | Path | None = None
    tick: Tick = silent


class RunKeywords(TypedDict, total=False):
    """The fields of RunOptions, as keywords."""

    device: str
    scratch: str | Path | None
    tick: Tick
