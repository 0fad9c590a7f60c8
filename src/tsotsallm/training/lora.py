"""Low-rank factors that are trained while the base stays unchanged (LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsotsallm.checkpoint.adapter import LowRank
from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.reader import layer_prefix
from tsotsallm.checkpoint.view import View
from tsotsallm.training.trainee import LayerChanges, Place


@dataclass
class Factors:
    """The trained factors B (d_out, r) and A (r, d_in) of one linear; they add scale·B·A to its weight."""

    left: Tensor
    right: Tensor

    @classmethod
    def new(cls, d_out: int, d_in: int, rank: int, generator: torch.Generator) -> Factors:
        """B zero and A uniform in ±1/√d_in, as in PEFT, so that the adapted linear starts out equal to its base."""
        right = torch.empty(rank, d_in).uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
        return cls(torch.zeros(d_out, rank).requires_grad_(), right.requires_grad_())


@dataclass
class Dropout:
    """Drops inputs of the factors, drawn from (seed, step, linear, batch) alone.

    A layer that is computed twice, forward and again for the backward pass, therefore drops the same ones.
    """

    share: float = 0.0
    seed: int = 0
    step: int = 0
    active: bool = False
    calls: dict[Place, int] = field(default_factory=dict)

    def begin(self, step: int, *, active: bool) -> None:
        """Start a step; nothing is dropped unless `active`."""
        self.step, self.active = step, active
        self.calls.clear()

    def forget_calls(self, layer: int) -> None:
        """Start counting again for a layer that is computed again from its first batch."""
        self.calls = {place: count for place, count in self.calls.items() if place[0] != layer}

    def __call__(self, inputs: Tensor, place: Place) -> Tensor:
        if not self.active or not self.share:
            return inputs
        self.calls[place] = call = self.calls.get(place, 0) + 1
        identity = f"{self.seed}/{self.step}/{place[0]}/{place[1]}/{call}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(identity).digest()[:7]))
        kept = torch.rand(inputs.shape, generator=generator) >= self.share
        return inputs * (kept / (1 - self.share)).to(inputs)


class LowRankLinear(nn.Module):
    """A linear that computes with base + scale·B·A; with M ⊙ (W₀ + scale·B·A) where a base was pruned by mask M.

    The base is a dense weight, or stays packed and is unpacked for every product (a packed base is never masked: the
    factors stay beside it). Factors and base are not parameters of the module, so moving it moves neither; factors are
    trained on the CPU and follow the inputs to their device.
    """

    def __init__(self, base: nn.Module, factors: Factors, scale: float, dropout: Dropout, place: Place, *,
                 masked: bool) -> None:
        super().__init__()
        object.__setattr__(self, "base", base)
        self.factors, self.scale, self.dropout, self.place, self.masked = factors, scale, dropout, place, masked

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        kept = self.dropout(inputs, self.place)
        base: Any = self.base
        left, right = self.factors.left.to(inputs.device), self.factors.right.to(inputs.device)
        if self.masked:
            change = (left @ right) * self.scale * (base.weight != 0)
            if kept is inputs:
                return functional.linear(inputs, base.weight + change, base.bias)
            output: Tensor = base(inputs) + functional.linear(kept, change)
            return output
        added = functional.linear(functional.linear(kept, right), left)
        together: Tensor = base(inputs) + self.scale * added
        return together


@dataclass
class Adapted:
    """The linears that are trained, and how."""

    factors: dict[Place, Factors]
    scale: float
    dropout: Dropout
    masked: bool

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by name: LAYER.LINEAR.B and LAYER.LINEAR.A."""
        found = {}
        for (layer, name), factors in self.factors.items():
            found[f"{layer}.{name}.B"], found[f"{layer}.{name}.A"] = factors.left, factors.right
        return found

    def change(self, place: Place) -> tuple[Tensor, Tensor]:
        """(scale·B, A) of a linear, as stored in an adapter whose alpha equals its rank."""
        factors = self.factors[place]
        return factors.left.detach() * self.scale, factors.right.detach()

    def of_layer(self, index: int) -> dict[str, Tensor]:
        """The trained tensors of one layer, by name."""
        return {name: tensor for name, tensor in self.tensors().items() if name.startswith(f"{index}.")}

    def begin(self, step: int, *, active: bool) -> None:
        """Start a step; inputs are dropped only where it is active."""
        self.dropout.begin(step, active=active)

    def again(self, index: int) -> None:
        """Drop the same inputs again where a layer is computed again."""
        self.dropout.forget_calls(index)

    def install(self, layer: nn.Module, index: int) -> Callable[[], None]:
        """Install the factors of layer `index` in its module; returns a function that removes them again."""
        taken = []
        for (where, name), factors in self.factors.items():
            if where == index:
                base = layer.get_submodule(name)
                layer.set_submodule(name, LowRankLinear(base, factors, self.scale, self.dropout, (where, name),
                                                        masked=self.masked))
                taken.append((name, base))

        def undo() -> None:
            for name, base in taken:
                layer.set_submodule(name, base)
        return undo


@dataclass
class LowRankTrainee:
    """A model whose factors are trained: its base, the factors, and whether they are merged or stay beside its weights."""

    base: View
    adapted: Adapted
    merge: bool

    def beside_before(self, index: int, name: str) -> LowRank | None:
        """The correction that the base already has beside a linear; None where it has none."""
        return self.base.checkpoint.beside(layer_prefix(self.base.stored(index)) + name)

    def layer(self, index: int) -> LayerChanges:
        """The changes that training made to layer `index`, rounded to the type of storage."""
        storage = self.base.checkpoint.storage
        changes = LayerChanges()
        for (layer, name) in self.adapted.factors:
            if layer != index:
                continue
            left, right = self.adapted.change((layer, name))
            if self.merge:
                weight = self.base.layer_tensor(index, f"{name}.weight")
                change = left @ right
                changes.merged[name] = Linear(name, weight, storage, values=weight + (
                    change * (weight != 0) if self.adapted.masked else change), edited=True)
                continue
            if (before := self.beside_before(index, name)) is not None:
                left, right = torch.cat([before.left.float(), left], 1), torch.cat([before.right.float(), right])
            changes.beside[name] = LowRank(left.to(storage), right.to(storage))
        return changes
