"""What the result of a fit must meet."""

from __future__ import annotations

from dataclasses import dataclass

from tsotsallm.errors import StudyError
from tsotsallm.evaluation.cost import devices, room_for_weights


@dataclass(frozen=True)
class Target:
    """What the result must meet: bytes of the GGUF file, tokens a second on this machine."""

    bytes: int
    faster_than: float | None = None
    device: str | None = None


def target_of(spec_bytes_per_token: int, *, device: str | None, size: int | None, faster_than: float | None,
              context: int = 512) -> Target:
    """A target from a device's name or a size; most devices also hold the 16-bit cache of `context` tokens."""
    if (device is None) == (size is None):
        raise StudyError("say what the model must fit: --device NAME or --bytes SIZE, one of them; `tsotsallm devices` "
                         "lists the devices")
    if faster_than is not None and faster_than <= 0:
        raise StudyError(f"--faster-than is {faster_than}; it takes tokens a second above 0")
    if size is not None:
        return Target(size, faster_than)
    known = devices()
    if device not in known:
        raise StudyError(f"there is no device {device!r}; `tsotsallm devices` lists them: {', '.join(known)}")
    return Target(room_for_weights(known[device], context * spec_bytes_per_token), faster_than, device)
