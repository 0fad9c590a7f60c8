"""What the result of a fit must meet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from tsotsallm.checkpoint.gguf_layout import UNKNOWN_LABELS, layout_of, vocabulary_entries
from tsotsallm.checkpoint.gguf_vocabulary import read_vocabulary
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.compression import plan
from tsotsallm.errors import StudyError
from tsotsallm.evaluation.cost import THIS_COMPUTER, devices_here, room_for_weights
from tsotsallm.inspection import inspect_checkpoint
from tsotsallm.planning import whole_spec
from tsotsallm.stages.quantize.sizes import matrix_weights
from tsotsallm.units import human_bytes

USUAL_BITS = 4.5
"""Bits a weight where no size is asked for: little is lost with them, and with fewer soon much more."""
FORECASTS = 6
"""How many mixtures a fit has time for, where no minutes are given: one measures grids, each candidate is one, and removing
layers and neurons, as far as that may be of use, takes as long as one or two."""
LEAST_MINUTES = 5.0
CONTEXT = 512
"""Tokens whose 16-bit cache a device must hold beside the weights."""


class FitsAlready(StudyError):
    """A model fits a device as it is, so that nothing needs to be done.

    smaller  a size, as `--bytes` takes it, that it could be given all the same
    """

    def __init__(self, name: str, device: str, size: int, room: int) -> None:
        self.smaller = human_bytes(size // 2).replace(" ", "")
        self.found = (f"{name} fits {device} already: it has {human_bytes(size)}, and of the {human_bytes(room)} there for "
                      f"it {human_bytes(room - size)} are left")
        super().__init__(f"{self.found}; nothing is done. To make it smaller all the same, say how small, such as --bytes "
                         f"{self.smaller}")


@dataclass(frozen=True)
class Target:
    """What the result must meet: bytes of the GGUF file, tokens a second on this machine; `why` gives the reason."""

    bytes: int
    faster_than: float | None = None
    device: str | None = None
    why: str = ""


def target_of(spec_bytes_per_token: int, *, device: str | None, size: int | None, faster_than: float | None) -> Target:
    """A target from a device's name or a size; most devices also hold the 16-bit cache of CONTEXT tokens."""
    if (device is None) == (size is None):
        raise StudyError("say what the model must fit: --device NAME or --bytes SIZE, one of them; `tsotsallm devices` "
                         "lists the devices")
    _require_speed(faster_than)
    if size is not None:
        return Target(size, faster_than)
    known = devices_here()
    if device not in known:
        raise StudyError(f"there is no device {device!r}; `tsotsallm devices` lists them: {', '.join(known)}")
    return Target(room_for_weights(known[device], CONTEXT * spec_bytes_per_token), faster_than, device)


def usual_target(checkpoint: Checkpoint, name: str, faster_than: float | None = None) -> Target:
    """The target where nothing is asked for: USUAL_BITS a weight, or less where this computer has no room for that.

    Raises FitsAlready where the model has so few bits already.
    """
    _require_speed(faster_than)
    spec, has = whole_spec(checkpoint), inspect_checkpoint(checkpoint).bytes
    layout = layout_of(spec, vocabulary_entries(read_vocabulary(checkpoint.codec)), UNKNOWN_LABELS)
    usual = layout.bytes_beside_matrices + int(USUAL_BITS * matrix_weights(spec) / 8)
    room = room_for_weights(devices_here()[THIS_COMPUTER], CONTEXT * spec.kv_bytes_per_token())
    if room < min(usual, has):
        return Target(room, faster_than, why=f"this computer has room for {human_bytes(room)} beside its system and other "
                                             "programs")
    if usual >= has and faster_than is None:
        raise FitsAlready(name, THIS_COMPUTER, has, room)
    return Target(min(usual, has), faster_than, why=f"{USUAL_BITS} bits a weight lose little; this computer has room for "
                                                     f"{human_bytes(room)}")


def usual_minutes(model: str | Path, calibration: str | None, windows: int, window: int) -> float:
    """FORECASTS times as long as one mixture is forecast to take, and LEAST_MINUTES at least."""
    mixture = [{"quantize": {"bits_per_weight": USUAL_BITS}}]
    planned = plan(model, mixture, calibration=calibration, windows=windows, window=window)
    return max(LEAST_MINUTES, math.ceil(FORECASTS * planned.expected_s / 60))


def _require_speed(faster_than: float | None) -> None:
    if faster_than is not None and faster_than <= 0:
        raise StudyError(f"--faster-than is {faster_than}; it takes tokens a second above 0")


def refuse_what_fits(checkpoint: Checkpoint, name: str, target: Target) -> None:
    """Raise FitsAlready where a device holds a model as it is, and no speed is asked for."""
    size = inspect_checkpoint(checkpoint).bytes
    if target.device is not None and target.faster_than is None and size <= target.bytes:
        raise FitsAlready(name, target.device, size, target.bytes)
