"""Tuning: a quantised model learns to say what its original says, and not a byte is added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tsotsallm.checkpoint.shapes import layer_shapes, linear_shapes
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import RecipeError
from tsotsallm.files import JsonObject
from tsotsallm.stages.contract import Model, Short, whole_number
from tsotsallm.stages.retraining import Retraining
from tsotsallm.streaming.sweep import Tick
from tsotsallm.training.engines import Engine
from tsotsallm.training.imitation import Imitation
from tsotsallm.training.loop import Curve
from tsotsallm.training.samples import Samples
from tsotsallm.training.trainee import Trainee
from tsotsallm.training.tuning import Tuned, TunedTrainee, factors_of, moves_of
from tsotsallm.validation import Count, Positive

Part = Literal["norms", "scales", "codes"]
SCALES_A_WEIGHT = 0.14
"""Scales and minima for each weight at most: two for every sixteen columns, and two for every 256 (q2_k)."""


def _short(values: list[str]) -> JsonObject:
    return {"what": values[0].split("+")} | ({"steps": whole_number(values[1], "tune")} if len(values) == 2 else {})


@dataclass(frozen=True)
class Tune(Retraining):
    """After rounding, change the stored numbers so that the loss falls; the file stays as large as it was.

    what     norms (and biases, where a family has them) and scales learn the original's distribution, the whole model at
             once (self-distillation of quantised weights); codes learn to give the outputs of the original's layer, one
             layer after another, each moving by at most one step (AutoRound, arXiv:2309.05516), with the others of `what`
    top      how many of the original's most probable tokens are kept for every position; all others count as one
    samples  with codes: windows of text that are used, at most; one of them or more is held out
    """

    name: ClassVar[str] = "tune"
    shorts: ClassVar[dict[str, Short]] = {"tune": Short(_short, "tune:scales+norms or tune:scales+norms:STEPS", 2)}
    what: Annotated[list[Part], Field(min_length=1)] = field(default_factory=lambda: ["norms", "scales"])
    top: Count = 64
    samples: Annotated[int, Field(ge=2)] = 64
    learning_rate: Positive = 2e-3
    batch: Count = 4
    steps: Count = 60
    window: Annotated[int, Field(ge=2)] = 256

    @property
    def layerwise(self) -> bool:
        """Whether layers learn one after another: where codes move."""
        return "codes" in self.what

    @property
    def samples_seen(self) -> int:
        """Windows of text kept on disk while layers learn."""
        return self.samples

    def check(self, model: Model) -> None:
        """Raise RecipeError where nothing is quantised, or where layers to imitate are out of order."""
        super().check(model)
        if not model.packed:
            raise RecipeError("tune changes the scales and codes of quantised weights, but these are dense; put it after "
                              "quantize")
        if self.layerwise and not model.in_order:
            raise RecipeError("tune moves codes by what the original's layers give, but the layers do not stand in its "
                              "order, each once; leave codes out for repeated or reordered layers")

    def shape(self, model: Model) -> Model:
        """The same bytes, but for norms and biases, which may be kept in 32 bits."""
        after = super().shape(model)
        layers = [replace(layer, size=layer.size + 2 * _small_values(model.spec, index))
                  for index, layer in enumerate(after.layers)]
        return replace(after, layers=tuple(layers))

    def trained_values(self, spec: ModelSpec) -> int:
        """Numbers trained at a time: of one layer, or of all."""
        weights = [sum(rows * columns for rows, columns in linear_shapes(spec, layer).values())
                   for layer in range(spec.layers)]
        share = SCALES_A_WEIGHT + (1 if self.layerwise else 0)
        return int(share * (max(weights) if self.layerwise else sum(weights)))

    def prepare(self, view: View, *, sparse: bool) -> TunedTrainee:
        """The model with factors for its norms and scales that change nothing yet."""
        def start(index: int) -> dict[str, Tensor]:
            return factors_of(view, index, norms="norms" in self.what, scales="scales" in self.what)

        return TunedTrainee(view, Tuned(view, start, sparse=sparse))

    def imitation(self, view: View, original: View, kept: list[int], samples: Samples, directory: Path,
                  device: torch.device, *, sparse: bool) -> Imitation:
        """Layer by layer: what trains codes, and scales and norms with them, to give the original's outputs."""
        def start(index: int) -> dict[str, Tensor]:
            found = factors_of(view, index, norms="norms" in self.what, scales="scales" in self.what)
            return found | moves_of(view, index, lambda module: original.layer_tensor(kept[index], f"{module}.weight"))

        trainee = TunedTrainee(view, Tuned(view, start, one_layer=True, sparse=sparse))
        return Imitation(original, kept, samples.at_most(self.samples), self, directory, device, trainee=trainee,
                         sparse=sparse)

    def train(self, trainee: Trainee, samples: Sequence[Samples], engine: Engine, state: Path, tick: Tick,
              original: View) -> list[Curve]:
        """Train on the original's tokens; continues from the files in `state`."""
        return self.taught(original, trainee, samples, engine, state, tick, top=self.top, whole=True)


def _small_values(spec: ModelSpec, layer: int) -> int:
    return sum(shape[0] for shape in layer_shapes(spec, layer).values() if len(shape) == 1)
