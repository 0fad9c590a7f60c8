"""LoRA and QLoRA: win back quality, or learn a domain, by training low-rank factors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from tsotsallm.checkpoint.anatomy import linear_shapes
from tsotsallm.checkpoint.reader import layer_prefix
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import RecipeError
from tsotsallm.stages.retraining import Retraining, Trained, module_names
from tsotsallm.training.lora import Adapted, Dropout, Factors, Place, Trainee


@dataclass(frozen=True)
class Adapt(Retraining):
    """Train B·A of rank `rank` beside every target linear (LoRA, arXiv:2106.09685); on packed linears QLoRA (2305.14314).

    alpha    the factors count alpha / rank; nothing: the rank, so that they count once
    targets  q, k, v, o, gate, up, down, or all
    dropout  share of the factors' inputs that a step leaves out
    init     zero: start as the base computes; eora: start from the correction that `compensate` left
    merge    add the factors to the weights; nothing: where these are dense. On a pruned model W = M ⊙ (W₀ + s·B·A) is
             trained and merged, so that no zero is lost
    """

    name: ClassVar[str] = "adapt"
    rank: int = 8
    alpha: float | None = None
    targets: list[Any] = field(default_factory=lambda: ["q", "k", "v", "o"])
    dropout: float = 0.0
    init: Literal["zero", "eora"] = "zero"
    merge: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise RecipeError(f"adapt.rank is {self.rank}; it takes 1 or more")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise RecipeError(f"adapt.alpha is {self.alpha}; it takes a positive number")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"adapt.dropout is {self.dropout}; it takes 0 or more, below 1")
        if not self.targets:
            raise RecipeError("adapt.targets is empty; it takes some of q, k, v, o, gate, up, down, or all")

    def check(self, spec: ModelSpec) -> None:
        module_names(self.targets, list(linear_shapes(spec, 0)), "adapt.targets")

    def check_base(self, found: Trained) -> None:
        if self.init == "eora" and not found.corrected:
            raise RecipeError("adapt.init is eora, but the stage before leaves no correction beside the linears; put a "
                              "compensate stage right before adapt")
        if found.packed and self.merge:
            raise RecipeError("adapt.merge adds to dense weights, but the base is quantised; leave merge out, or put adapt "
                              "before quantize")

    def places(self, spec: ModelSpec) -> list[Place]:
        """The linears that are trained."""
        return [(layer, name) for layer in range(spec.layers)
                for name in module_names(self.targets, list(linear_shapes(spec, layer)), "adapt.targets")]

    def trained_values(self, spec: ModelSpec) -> int:
        return sum(self.rank * sum(linear_shapes(spec, layer)[name]) for layer, name in self.places(spec))

    def kept_values(self, spec: ModelSpec, layer: int, *, packed: bool) -> list[int]:
        if self.init == "eora" or not (packed if self.merge is None else not self.merge):
            return []
        shapes = linear_shapes(spec, layer)
        return [self.rank * sum(shapes[name]) for where, name in self.places(spec) if where == layer]

    def prepare(self, view: View, *, sparse: bool) -> Trainee:
        """The base and the factors to start from; with `init: eora` the base stands without its corrections."""
        packed = view.spec.quantization is not None
        merge = not packed if self.merge is None else self.merge
        if sparse and not packed and not merge:
            raise RecipeError("adapt.merge is false, but factors beside a pruned model would fill its zeros; leave merge "
                              "out: they are then trained under the mask and merged")
        adapted = self._adapted(view, masked=sparse and merge)
        if self.init == "eora":
            names = (layer_prefix(view.stored(layer)) + name for layer, name in adapted.factors)
            view = replace(view, checkpoint=view.checkpoint.without_beside(names))
        return Trainee(view, adapted, merge)

    def _adapted(self, view: View, *, masked: bool) -> Adapted:
        generator = torch.Generator().manual_seed(self.seed)
        found: dict[Place, Factors] = {}
        for layer, name in self.places(view.spec):
            if self.init == "eora":
                beside = view.checkpoint.beside(layer_prefix(view.stored(layer)) + name)
                if beside is None:
                    raise RecipeError(f"adapt.init is eora, but layer {layer} has no correction beside {name}; put a "
                                      "compensate stage right before adapt")
                found[layer, name] = Factors(beside[0].float().requires_grad_(), beside[1].float().requires_grad_())
            else:
                found[layer, name] = Factors.new(*linear_shapes(view.spec, layer)[name], self.rank, generator)
        scale = 1.0 if self.init == "eora" else (self.alpha or self.rank) / self.rank
        return Adapted(found, scale, Dropout(self.dropout, self.seed), masked=masked)
