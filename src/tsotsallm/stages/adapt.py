"""LoRA and QLoRA: win back quality, or learn a domain, by training low-rank factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch

from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.checkpoint.reader import layer_prefix
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import RecipeError
from tsotsallm.files import Json, JsonObject
from tsotsallm.stages.contract import Model, Needs, Short, Workplace, decided_later, whole_number
from tsotsallm.stages.retraining import Retraining, Targets, module_names
from tsotsallm.stages.selection import Selection, places_of
from tsotsallm.training.domain import graph_text
from tsotsallm.training.lora import Adapted, Dropout, Factors, LowRankTrainee
from tsotsallm.training.samples import Samples
from tsotsallm.training.trainee import Place
from tsotsallm.validation import Count, Part, Positive


def _short(values: list[str]) -> JsonObject:
    return {"rank": whole_number(values[0], "lora")} | ({"data": values[1]} if len(values) == 2 else {})


@dataclass(frozen=True)
class Adapt(Retraining):
    """Train B·A of rank `rank` beside every target linear (LoRA, arXiv:2106.09685); on packed linears QLoRA (2305.14314).

    rank     of the factors
    alpha    the factors count alpha / rank; nothing: the rank, so that they count once
    targets  q, k, v, o, gate, up, down, or all
    dropout  share of the factors' inputs that a step leaves out
    init     zero: start as the base computes; eora: start from the correction that `compensate` left
    merge    add the factors to the weights; nothing: where these are dense. On a pruned model W = M ⊙ (W₀ + s·B·A) is
             trained and merged, so that no zero is lost
    select   {graph: FILE, share: 0.2}: only those of the targets that a domain needs most, up to a share of their weights.
             The graph is put into sentences, which are also the training data where none is given; a linear is needed
             where they ask more of it than general text does, by its gradient and its inputs. by: random is for comparison
    """

    name: ClassVar[str] = "adapt"
    shorts: ClassVar[dict[str, Short]] = {"lora": Short(_short, "lora:RANK or lora:RANK:FILE", 2, file_last=True)}
    rank: Count = 8
    alpha: Positive | None = None
    targets: Targets = field(default_factory=lambda: ["q", "k", "v", "o"])
    dropout: Part = 0.0
    init: Literal["zero", "eora"] = "zero"
    merge: bool | None = None
    select: Selection | None = None
    chosen: tuple[Place, ...] | None = decided_later()

    @property
    def needs(self) -> Needs:
        """Gradients; text to choose targets by, and text to train on where no data is named."""
        return Needs(text=self.select is not None and self.select.by_saliency, gradients=True,
                     training_text=not self.sources and self.select is None)

    @property
    def surveys(self) -> bool:
        """Whether the linears to train are chosen by a domain."""
        return bool(self.select)

    def read(self, codec: TextCodec, spec: ModelSpec, text: str | None, source: str) -> list[Samples]:
        """All samples; a domain's graph gives its sentences where no data is named."""
        if not self.select:
            return super().read(codec, spec, text, source)
        graph = self.select.graph
        return super().read(codec, spec, graph_text(graph), graph)      # what is wrong with a graph is told first

    def survey(self, view: View, workplace: Workplace) -> JsonObject:
        """The linears that the domain needs most, and the score of every one."""
        assert self.select is not None
        return self.select.survey(view, workplace, self.places(view.spec), self.seed)

    def decided(self, decision: Mapping[str, Json]) -> Self:
        """The stage with the linears that the survey chose."""
        return replace(self, chosen=places_of(decision))

    def check(self, model: Model) -> None:
        """Raise RecipeError where a target is unknown, or where factors do not fit the base that the stage will find."""
        module_names(self.targets, list(linear_shapes(model.spec, 0)), "adapt.targets")
        super().check(model)
        if self.init == "zero" and model.corrected and not model.packed:
            raise RecipeError("adapt would merge the correction that compensate left beside dense weights, and fill their "
                              "zeros; start from it with `init: eora`, or merge it in compensate")
        if self.init == "eora" and model.corrected is False:
            raise RecipeError("adapt.init is eora, but the stage before leaves no correction beside the linears; put a "
                              "compensate stage right before adapt")
        if model.packed and self.merge:
            raise RecipeError("adapt.merge adds to dense weights, but the base is quantised; leave merge out, or "
                              f"{model.made_dense(self.name)}")

    def places(self, spec: ModelSpec) -> list[Place]:
        """The linears that are trained."""
        if self.chosen is not None:
            return list(self.chosen)
        return [(layer, name) for layer in range(spec.layers)
                for name in module_names(self.targets, list(linear_shapes(spec, layer)), "adapt.targets")]

    def trained_values(self, spec: ModelSpec) -> int:
        """Numbers in all factors; of a selection at most its share."""
        values = sum(self.rank * sum(linear_shapes(spec, layer)[name]) for layer, name in self.places(spec))
        if self.chosen is not None or not self.select:
            return values
        return math.ceil(self.select.share * values)

    def kept_values(self, spec: ModelSpec, layer: int, *, packed: bool) -> list[int]:
        """Numbers in the factors of a layer, where they stay beside the linears."""
        if self.init == "eora" or not (packed if self.merge is None else not self.merge):
            return []
        shapes = linear_shapes(spec, layer)
        return [self.rank * sum(shapes[name]) for where, name in self.places(spec) if where == layer]

    def prepare(self, view: View, *, sparse: bool) -> LowRankTrainee:
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
        return LowRankTrainee(view, adapted, merge)

    def _adapted(self, view: View, *, masked: bool) -> Adapted:
        generator = torch.Generator().manual_seed(self.seed)
        found: dict[Place, Factors] = {}
        for layer, name in self.places(view.spec):
            if self.init == "eora":
                beside = view.checkpoint.beside(layer_prefix(view.stored(layer)) + name)
                if beside is None:
                    raise RecipeError(f"adapt.init is eora, but layer {layer} has no correction beside {name}; put a "
                                      "compensate stage right before adapt")
                found[layer, name] = Factors(beside.left.float().requires_grad_(), beside.right.float().requires_grad_())
            else:
                found[layer, name] = Factors.new(*linear_shapes(view.spec, layer)[name], self.rank, generator)
        scale = 1.0 if self.init == "eora" else (self.alpha or self.rank) / self.rank
        return Adapted(found, scale, Dropout(self.dropout, self.seed), masked=masked)
