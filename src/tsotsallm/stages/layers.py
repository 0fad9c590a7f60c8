"""An explicit order of layers: skip, repeat, reorder."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from tsotsallm.checkpoint.spec import MOST_LAYERS
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import RecipeError
from tsotsallm.stages.contract import Choice, LayerChoice, Model, Short, Workplace


def expand(items: object, where: str) -> list[int]:
    """[0-3, 5] -> [0, 1, 2, 3, 5]; a range may run backwards (3-0)."""
    if not isinstance(items, (list, tuple)):
        items = [items]
    layers: list[int] = []
    for item in items:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(item))
        if isinstance(item, bool) or not match:
            raise RecipeError(f"{where} holds {item!r}; it takes layer numbers and ranges such as 0-3")
        first, last = int(match[1]), int(match[2] or match[1])
        if max(first, last) > MOST_LAYERS:
            raise RecipeError(f"{where} names layer {max(first, last)}; no model has that many")
        layers += range(first, last + 1) if first <= last else range(first, last - 1, -1)
    return layers


@dataclass(frozen=True)
class Layers(LayerChoice):
    """Run the layers in `order`, or all but `skip` with those of `repeat` several times (FRANKEN-LLAMA).

    order   layers and ranges in the order in which they run, such as [0-3, 5, 4]
    skip    layers and ranges that do not run
    repeat  {layer: times}: layers that run several times
    shared  repeated layers are stored once, in the project's own container
    """

    name: ClassVar[str] = "layers"
    shorts: ClassVar[dict[str, Short]] = {
        "layers": Short(lambda values: {"order": values[0].split("+")}, "layers:0-3+5+6"),
        "skip": Short(lambda values: {"skip": values[0].split("+")}, "skip:3+7-9")}
    order: list[int | str] | int | str | None = None
    skip: list[int | str] | int | str | None = None
    repeat: dict[int | str, Annotated[int, Field(ge=1, le=100)]] | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if (self.order is None) == (self.skip is None and self.repeat is None):
            raise RecipeError("layers takes either `order`, or `skip` and `repeat`")
        self._named()

    def _named(self) -> list[int]:
        if self.order is not None:
            return expand(self.order, "layers.order")
        return (expand(self.skip if self.skip is not None else [], "layers.skip")
                + [layer for key in (self.repeat or {}) for layer in expand(key, "layers.repeat")])

    def keeps_order(self, layers: int) -> bool:
        """Whether the order rises strictly."""
        order = self.resolve(layers)
        return all(earlier < later for earlier, later in itertools.pairwise(order))

    def resolve(self, layers: int) -> list[int]:
        """The order for a model of so many layers."""
        for layer in self._named():
            if layer >= layers:
                raise RecipeError(f"layers names layer {layer}, but the model has layers 0 to {layers - 1}")
        if self.order is not None:
            order = expand(self.order, "layers.order")
        else:
            skipped = set(expand(self.skip if self.skip is not None else [], "layers.skip"))
            times = {layer: count for key, count in (self.repeat or {}).items()
                     for layer in expand(key, "layers.repeat")}
            order = [layer for layer in range(layers) if layer not in skipped for _ in range(times.get(layer, 1))]
        if not order:
            raise RecipeError("layers leaves no layer; keep at least one")
        return order

    @property
    def shares_repeats(self) -> bool:
        """Whether `shared` is set."""
        return self.shared

    def check(self, model: Model) -> None:
        """Raise RecipeError where a layer is named that the model does not have."""
        self.resolve(model.spec.layers)

    def layers_after(self, layers: int) -> int:
        """The length of the order."""
        return len(self.resolve(layers))

    def known(self, layers: int) -> list[int]:
        """The order, which no weight decides."""
        return self.resolve(layers)

    def choose(self, view: View, workplace: Workplace) -> Choice:
        """The order as configured."""
        return Choice(self.resolve(view.spec.layers))
