"""What was measured of a model's units, as files that a later fit takes over."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tsotsallm.checkpoint.writer import write_json
from tsotsallm.files import JsonObject
from tsotsallm.fit.plans import Measured


@dataclass(frozen=True)
class Mixture:
    """The first model built: every matrix on a grid of its own. The loss predicted and measured, and what it took."""

    predicted: float
    measured: float
    seconds: float


@dataclass
class Ranking:
    """How far the removal of layers is measured: what each is worth alone, which went, the losses, and which go next."""

    alone: dict[int, float]
    gone: list[int]
    losses: list[float]
    next: list[int]

    @classmethod
    def of(cls, plain: JsonObject) -> Ranking:
        """What `plain` gave; nothing is measured where it is empty."""
        return cls({int(layer): loss for layer, loss in plain.get("alone", {}).items()}, plain.get("gone", []),
                   plain.get("losses", [0.0]), plain.get("next", []))

    def plain(self) -> JsonObject:
        """The same as JSON holds it."""
        return asdict(self) | {"alone": {str(layer): loss for layer, loss in self.alone.items()}}


def write_units(path: Path, measured: Measured, mixture: Mixture) -> None:
    """Write what was measured, so that a later fit finds it."""
    write_json(path, plain_units(measured) | {"mixture": asdict(mixture)})


def plain_units(measured: Measured) -> JsonObject:
    """Units as JSON holds them."""
    plain = asdict(measured)
    for name in ("width", "vocabulary", "alone"):
        plain[name] = {str(key): value for key, value in plain[name].items()}
    return plain


def read_units(path: Path) -> tuple[Measured, Mixture] | None:
    """What was measured before; None where nothing was, or where the file is damaged."""
    try:
        plain = json.loads(path.read_text("utf-8"))
        return _measured(plain), Mixture(**plain["mixture"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _measured(plain: JsonObject) -> Measured:
    return Measured(tuple(plain["order"]), tuple(plain["depth"]),
                    {float(share): loss for share, loss in plain["width"].items()}, plain["grids"],
                    {int(size): loss for size, loss in plain["vocabulary"].items()},
                    {int(layer): loss for layer, loss in plain["alone"].items()}, plain["seconds"],
                    plain["activations"], plain["until"])
