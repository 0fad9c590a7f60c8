"""What training needs of a model in training, whatever is trained of it, and what it leaves of every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from tsotsallm.checkpoint.adapter import LowRank
from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.view import View

Place = tuple[int, str]
"""A linear of the model: (layer, name inside the layer)."""


@dataclass
class LayerChanges:
    """How training changed a layer, by name inside the layer.

    merged   linears with new values
    beside   corrections beside linears
    changed  other tensors, such as norms
    """

    merged: dict[str, Linear] = field(default_factory=dict)
    beside: dict[str, LowRank] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)


class Trained(Protocol):
    """The tensors that are trained, and how a layer computes with them."""

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by name, which begins with the number of their layer."""

    def of_layer(self, index: int) -> dict[str, Tensor]:
        """The trained tensors of one layer, by name."""

    def install(self, layer: nn.Module, index: int) -> Callable[[], None]:
        """Let the module of layer `index` compute with them; returns a function that restores it."""

    def begin(self, step: int, *, active: bool) -> None:
        """Start a step; inactive ones only measure."""

    def again(self, index: int) -> None:
        """Prepare for a layer that is computed again, with the same outcome."""


class Trainee(Protocol):
    """A model in training."""

    @property
    def base(self) -> View:
        """The model that training began with."""

    @property
    def adapted(self) -> Trained:
        """What is trained of it."""

    def layer(self, index: int) -> LayerChanges:
        """The changes that training made to layer `index`, rounded to the types of storage."""
