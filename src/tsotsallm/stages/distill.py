"""Distillation: a smaller model learns what its original says, or what every one of its layers gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import RecipeError
from tsotsallm.stages.adapt import Adapt
from tsotsallm.stages.contract import Model, Short
from tsotsallm.stages.retraining import Targets
from tsotsallm.streaming.sweep import Tick
from tsotsallm.training.engines import Engine
from tsotsallm.training.imitation import Imitation
from tsotsallm.training.loop import Curve
from tsotsallm.training.samples import Samples
from tsotsallm.training.trainee import Trainee
from tsotsallm.validation import Count

TEACHER = "original"


@dataclass(frozen=True)
class Distill(Adapt):
    """Learn from a teacher: the model that the recipe began with, or another checkpoint with the same tokens.

    mode         layers: every layer, one after another, learns to give on the inputs that it now gets what the original
                 gives at the same depth, the layers that were removed after it included (in the manner of HomoDistil,
                 arXiv:2302.09632); logits: low-rank factors learn the teacher's distribution (arXiv:1503.02531)
    teacher      original: the model that the recipe began with; or the directory of another checkpoint
    weights      with `layers`: all weights of a layer, or low-rank factors beside its targets
    samples      with `layers`: windows of text that are used, at most; one of them or more is held out
    temperature  with `logits`: softens both distributions
    top          with `logits`: how many of the teacher's tokens are kept, on disk, so that it is read once
    """

    name: ClassVar[str] = "distill"
    shorts: ClassVar[dict[str, Short]] = {
        "distill": Short(lambda values: {"mode": values[0]}, "distill:layers or distill:logits")}
    targets: Targets = field(default_factory=lambda: ["all"])
    mode: Literal["layers", "logits"] = "layers"
    teacher: str = TEACHER
    weights: Literal["all", "lora"] = "all"
    samples: Annotated[int, Field(ge=2)] = 128
    temperature: Annotated[float, Field(gt=0, lt=100)] = 1.0
    top: Count = 64

    @property
    def layerwise(self) -> bool:
        """Whether layers learn one after another."""
        return self.mode == "layers"

    @property
    def samples_seen(self) -> int:
        """Windows of text kept on disk while layers learn."""
        return self.samples

    def check_source(self, original: View) -> None:
        """Raise RecipeError where the teacher does not fit the model."""
        self.teacher_of(original)

    def check(self, model: Model) -> None:
        """Raise RecipeError where layers are out of order, or where weights to train are codes."""
        super().check(model)
        if self.layerwise and not model.in_order:
            raise RecipeError("distill imitates the original layer by layer, but the layers do not stand in its order, each "
                              "once; use mode logits for repeated or reordered layers")
        if model.packed and self.layerwise and self.weights == "all":
            raise RecipeError("distill trains all weights of a layer, but quantisation made codes of them; "
                              f"{model.made_dense(self.name)}, or train low-rank factors with `weights: lora`")

    def trained_values(self, spec: ModelSpec) -> int:
        """Numbers trained at a time: of one layer, or of all factors."""
        if not self.layerwise:
            return super().trained_values(spec)
        if self.weights == "all":
            return max(sum(rows * columns for rows, columns in linear_shapes(spec, layer).values())
                       for layer in (0, spec.layers - 1))
        return super().trained_values(spec) // spec.layers

    def kept_values(self, spec: ModelSpec, layer: int, *, packed: bool) -> list[int]:
        """Numbers in the factors of a layer that stay beside its linears."""
        if self.layerwise and self.weights == "all":
            return []
        return super().kept_values(spec, layer, packed=packed)

    def teacher_of(self, original: View) -> View:
        """The model to learn from."""
        if self.teacher == TEACHER:
            return original
        found = View.of(Checkpoint.open(self.teacher))
        if found.spec.vocabulary != original.spec.vocabulary:
            raise RecipeError(f"distill.teacher {self.teacher} has {found.spec.vocabulary} tokens and the model "
                              f"{original.spec.vocabulary}; they must be the same")
        if self.layerwise and (found.spec.layers, found.spec.hidden) != (original.spec.layers, original.spec.hidden):
            raise RecipeError(f"distill.teacher {self.teacher} has {found.spec.layers} layers of {found.spec.hidden} and "
                              f"the model {original.spec.layers} of {original.spec.hidden}: its layers cannot be imitated; "
                              "choose mode logits")
        return found

    def imitation(self, view: View, original: View, kept: list[int], samples: Samples, directory: Path,
                  device: torch.device, *, sparse: bool) -> Imitation:
        """Layer by layer: what trains the layers of `view`, which are the layers `kept` of the original."""
        trainee = None if self.weights == "all" else self.prepare(view, sparse=sparse)
        return Imitation(self.teacher_of(original), kept, samples.at_most(self.samples), self, directory, device,
                         trainee=trainee, sparse=sparse)

    def train(self, trainee: Trainee, samples: Sequence[Samples], engine: Engine, state: Path, tick: Tick,
              original: View) -> list[Curve]:
        """Train on the teacher's tokens; continues from the files in `state`."""
        return self.taught(self.teacher_of(original), trainee, samples, engine, state, tick, top=self.top,
                           temperature=self.temperature)
