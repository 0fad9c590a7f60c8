"""Numbers of a quantised model that are trained where they stand: scales, norms and biases as factors, codes as moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsotsallm.checkpoint.adapter import LowRank
from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.reader import layer_prefix
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.view import View
from tsotsallm.numerics.ggml import Blocks
from tsotsallm.numerics.grids import Stored
from tsotsallm.numerics.tuning import CODES, moves_towards, require_even, scale_shapes, tuned, tuned_values
from tsotsallm.training.trainee import LayerChanges

CPU = torch.device("cpu")
WEIGHT, BIAS = "weight", "bias"
MOVES = 5.0
"""Codes move so many times as fast as scales change: a step of one learning rate serves both."""


@dataclass(frozen=True)
class TunedWeight:
    """A weight on a grid and what is trained of it; `kept` (d_out, d_in) bool marks what may move in a pruned one.

    What is trained stays on the CPU, and follows the weight to its device.
    """

    stored: Stored
    beside: LowRank | None
    trained: Mapping[str, Tensor]
    kept: Tensor | None = None

    @property
    def changes(self) -> dict[str, Tensor]:
        """What is trained, moves in codes, without those of pruned weights."""
        changes = {name: tensor.to(self.stored.codes.device) for name, tensor in self.trained.items()}
        if CODES in changes:
            changes[CODES] = changes[CODES] * (MOVES if self.kept is None else MOVES * self.kept)
        return changes

    def values(self) -> Tensor:
        """The effective weight, (d_out, d_in) float32, with gradients for what is trained."""
        values = tuned_values(self.stored, self.changes)
        return values if self.beside is None else self.beside.added_to(values)


class _Product(torch.autograd.Function):
    """x·Wᵀ with W computed for the product and again for its gradients, never kept."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: TunedWeight, *trained: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(inputs)
        return functional.linear(inputs, weight.values().detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        (inputs,) = ctx.saved_tensors
        with torch.enable_grad():
            weight = ctx.weight.values()
        of_weight = gradient.flatten(0, -2).mT @ inputs.flatten(0, -2)
        of_trained = torch.autograd.grad(weight, list(ctx.weight.trained.values()), of_weight)
        return gradient @ weight.detach(), None, *of_trained


class TunedLinear(nn.Module):
    """A linear that computes with the trained numbers of its weight; a bias may be trained as well."""

    def __init__(self, weight: TunedWeight, bias: Tensor | None, bias_factor: Tensor | None) -> None:
        super().__init__()
        object.__setattr__(self, "tuned", weight)
        self.own_bias, self.bias_factor = bias, bias_factor

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        weight: Any = self.tuned
        product: Tensor = (_Product.apply(inputs, weight, *weight.trained.values())  # type: ignore[no-untyped-call]
                           if weight.trained else functional.linear(inputs, weight.values()))
        if self.own_bias is None:
            return product
        factor = None if self.bias_factor is None else self.bias_factor.to(inputs.device)
        return product + (self.own_bias if factor is None else self.own_bias * (1 + factor))


class TunedNorm(nn.Module):
    """A norm whose outputs, and so its weights, count 1 + δ times, δ (width,)."""

    def __init__(self, base: nn.Module, factor: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "base", base)
        self.factor = factor

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        base: Any = self.base
        output: Tensor = base(inputs) * (1 + self.factor.to(inputs.device))
        return output


@dataclass
class Tuned:
    """The trained numbers of a model: `LAYER.MODULE.NUMBERS` -> δ; see `numerics.tuning` for those of a weight.

    start      makes the numbers of a layer, as training begins with them
    one_layer  keep those of one layer only: layers are trained one after another
    """

    view: View
    start: Callable[[int], dict[str, Tensor]]
    one_layer: bool = False
    sparse: bool = False
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors of all layers, by name."""
        return {name: tensor for index in range(self.view.spec.layers) for name, tensor in self.of_layer(index).items()}

    def of_layer(self, index: int) -> dict[str, Tensor]:
        """The trained tensors of one layer, by name."""
        if index not in self.layers:
            if self.one_layer:
                self.layers.clear()
            self.layers[index] = {f"{index}.{name}": tensor.requires_grad_() for name, tensor in self.start(index).items()}
        return dict(self.layers[index])

    def modules(self, index: int) -> dict[str, dict[str, Tensor]]:
        """The trained tensors of one layer: module -> numbers -> δ."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.of_layer(index).items():
            module, _, numbers = name.partition(".")[2].rpartition(".")
            found.setdefault(module, {})[numbers] = tensor
        return found

    def begin(self, step: int, *, active: bool) -> None:
        """Start a step: nothing is random."""

    def again(self, index: int) -> None:
        """Nothing is random."""

    def weight(self, index: int, module: str, trained: Mapping[str, Tensor],
               device: torch.device = CPU) -> TunedWeight | None:
        """A linear's weight with what is trained of it; None for a module that is no linear on a grid."""
        checkpoint, name = self.view.checkpoint, layer_prefix(self.view.stored(index)) + module
        packed = checkpoint.packed(name)
        if packed is None:
            return None
        stored: Stored = packed.unpack().to(device)
        own = {numbers: tensor for numbers, tensor in trained.items() if numbers not in (WEIGHT, BIAS)}
        kept = stored.dequantise() != 0 if self.sparse and CODES in own else None
        return TunedWeight(stored, checkpoint.beside(name), own, kept)

    def install(self, layer: nn.Module, index: int) -> Callable[[], None]:
        """Let a layer compute with the trained numbers; returns a function that restores its modules."""
        taken, device = [], next(layer.parameters()).device
        for module, trained in self.modules(index).items():
            base: Any = layer.get_submodule(module)
            weight = self.weight(index, module, trained, device)
            made = (TunedNorm(base, trained[WEIGHT]) if weight is None else
                    TunedLinear(weight, base.bias, trained.get(BIAS)))
            layer.set_submodule(module, made)
            taken.append((module, base))

        def undo() -> None:
            for module, base in taken:
                layer.set_submodule(module, base)
        return undo


def factors_of(view: View, index: int, *, norms: bool, scales: bool) -> dict[str, Tensor]:
    """Factors that change nothing yet, one for each number of a layer that is trained: `MODULE.NUMBERS` -> zeros."""
    found: dict[str, tuple[int, ...]] = {}
    prefix = layer_prefix(view.stored(index))
    records = view.layer_records(index)
    if norms:
        found |= {name: tuple(record.shape) for name, record in records.items()
                  if len(record.shape) == 1 and name.endswith(("norm.weight", ".bias"))}
    if scales:
        for module, shape in linear_shapes(view.spec, index).items():
            if view.checkpoint.is_packed(prefix + module):
                grid = view.checkpoint.grid_of(prefix + module)
                found |= {f"{module}.{name}": size for name, size in scale_shapes(grid, *shape).items()}
    return {name: torch.zeros(shape) for name, shape in found.items()}


def moves_of(view: View, index: int, aims: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """Moves of a layer's codes that change none yet, towards the weights that `aims` has by module, where it has any."""
    found = {}
    for module in linear_shapes(view.spec, index):
        packed = view.checkpoint.packed(layer_prefix(view.stored(index)) + module)
        if packed is not None:
            stored, aim = packed.unpack(), aims(module)
            require_even(stored)
            found[f"{module}.{CODES}"] = (torch.zeros(stored.codes.shape) if aim is None or aim.shape != stored.codes.shape
                                          else moves_towards(stored, aim) / MOVES)
    return found


@dataclass
class TunedTrainee:
    """A quantised model whose numbers are trained."""

    base: View
    adapted: Tuned

    @torch.no_grad()
    def layer(self, index: int) -> LayerChanges:
        """The changes of layer `index`: codes and scales in the same places; norms in 32 bits where GGUF keeps them so."""
        storage, changes = self.base.checkpoint.storage, LayerChanges()
        offset = self.base.spec.traits.offset
        in_blocks = False
        norms: dict[str, Tensor] = {}
        for module, trained in self.adapted.modules(index).items():
            weight = self.adapted.weight(index, module, trained)
            if weight is None:
                before = self.base.layer_tensor(index, f"{module}.weight")
                norms[f"{module}.weight"] = (before + offset) * (1 + trained[WEIGHT]) - offset
                continue
            in_blocks |= isinstance(weight.stored, Blocks)
            changes.merged[module] = Linear(module, torch.empty(0), storage, stored=tuned(weight.stored, weight.changes),
                                            low_rank=weight.beside, edited=True)
            if BIAS in trained:
                norms[f"{module}.bias"] = self.base.layer_tensor(index, f"{module}.bias") * (1 + trained[BIAS])
        for name, values in norms.items():
            changes.changed[name] = values if in_blocks else values.to(storage)
        return changes
