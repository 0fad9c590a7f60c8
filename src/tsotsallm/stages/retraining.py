"""What stages that need gradients share: their schedule, their data, and the choice between memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.checkpoint.families import FUSED
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import CorpusError, RecipeError
from tsotsallm.files import JsonObject, quoted
from tsotsallm.stages.contract import Model, Needs, Stage, Workplace
from tsotsallm.stages.costs import (
    HEADER_BYTES_PER_TENSOR,
    Conditions,
    Cost,
    forward_flops,
    gradient_bytes_per_token,
    widest_layer_bytes,
)
from tsotsallm.streaming.head import PIECE_ROWS
from tsotsallm.streaming.hidden import BATCH_TOKENS
from tsotsallm.streaming.sweep import Tick
from tsotsallm.training.engines import MICRO_TOKENS, Engine
from tsotsallm.training.imitation import Imitation
from tsotsallm.training.loop import Curve, Schedule, train
from tsotsallm.training.objectives import Predicting, TeacherTokens
from tsotsallm.training.samples import MOST_HELD_OUT, Samples, read_samples, split, text_windows
from tsotsallm.training.trainee import Trainee

RESIDENT_SHARE = 0.8
"""A whole model is trained in memory when it takes at most this share of what is free."""
EngineChoice = Literal["auto", "resident", "streamed"]


Targets = Annotated[list[str], Field(min_length=1)]


@dataclass(frozen=True)
class Retraining(Schedule, Stage):
    """A stage that trains by its schedule; `data` is one source or several, trained on one after another.

    data       a text, a folder of texts, a .jsonl file of prompts and responses or conversations, or a hub data set;
               nothing: the text that the recipe is calibrated on
    window     tokens of a packed window of text
    held_out   share of the samples that training never sees and its progress is measured on
    engine     resident: the whole model in memory; streamed: one layer; auto: resident where it fits
    """

    name: ClassVar[str]
    data: str | Annotated[list[str], Field(min_length=1)] | None = None
    window: Annotated[int, Field(ge=2)] = 512
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    engine: EngineChoice = "auto"

    @property
    def layerwise(self) -> bool:
        """Whether layers are trained one after another, each by itself."""
        return False

    def visits(self, model: Model) -> int:
        """At least once to train on; streamed engines read every layer again in every step."""
        return 1 if self.layerwise else 2

    @property
    def samples_seen(self) -> int:
        """How many windows are kept on disk where layers are trained one after another."""
        return 0

    @property
    def sources(self) -> list[str]:
        """The data to train on one after another; empty for the recipe's own text."""
        return list(self.data) if isinstance(self.data, list) else [self.data] if self.data is not None else []

    @property
    def needs(self) -> Needs:
        """Gradients, and the calibration text where no data is named."""
        return Needs(gradients=True, training_text=not self.sources)

    def check(self, model: Model) -> None:
        """Raise RecipeError where repeated layers are shared."""
        if model.shares_repeats:
            raise RecipeError(f"{self.name} trains every layer by itself, but `shared` keeps repeated layers as one; leave "
                              "shared out")

    def shape(self, model: Model) -> Model:
        """The layers with the factors that stay beside them."""
        layers = []
        for index, layer in enumerate(model.layers):
            kept = self.kept_values(model.spec, index, packed=layer.packed)
            layers.append(replace(layer, size=layer.size + model.element * sum(kept)
                                  + 2 * HEADER_BYTES_PER_TENSOR * len(kept)))
        return replace(super().shape(model), layers=tuple(layers))

    def forecast(self, model: Model, conditions: Conditions) -> Cost:
        """Resident it is forward and backward through frozen weights; streamed, every layer is computed once more.

        Both pass the head by three times. Factors are kept with their gradient, two moments and their best values.
        """
        spec = model.spec
        tokens, window = self.tokens_a_step(spec), min(self.window, spec.context)
        dense, a_layer = widest_layer_bytes(spec), gradient_bytes_per_token(spec, window)
        ends = 4 * spec.vocabulary * spec.hidden * (1 if spec.tied else 2)
        state = 5 * 4 * self.trained_values(spec)
        head = 4 * PIECE_ROWS * (spec.hidden + 3 * BATCH_TOKENS)
        weights = sum(layer.size if layer.packed else dense for layer in model.layers)
        resident = weights + ends + state + head + spec.layers * a_layer * min(tokens, max(MICRO_TOKENS, window))
        streamed = int(1.25 * dense) + state + head + a_layer * max(BATCH_TOKENS, window)
        forward = sum(forward_flops(spec, layer, tokens, window) for layer in range(spec.layers))
        evaluations = -(-self.steps // self.look_every) + 1
        if self.layerwise:
            seen = self.samples_seen * window
            passes = 2 * seen + 3 * self.steps * tokens + evaluations * min(MOST_HELD_OUT, self.samples_seen) * window
            return Cost(int(1.25 * dense) + state + a_layer * window, 4 * 4 * seen * spec.hidden, forward * passes / tokens,
                        "layer by layer")
        engine: str = self.engine
        if engine == "auto":
            engine = "resident" if resident < RESIDENT_SHARE * conditions.free_ram_bytes else "streamed"
        past_head = 2.0 * tokens * spec.vocabulary * spec.hidden
        evaluation = MOST_HELD_OUT * window * (forward + past_head) / tokens
        step = (2 if engine == "resident" else 3) * forward + 3 * past_head
        flops = max(1, len(self.sources)) * (self.steps * step + evaluations * evaluation)
        if engine == "resident":
            return Cost(resident, 0, flops, engine)
        return Cost(streamed, (spec.layers + 4) * 4 * max(tokens, MOST_HELD_OUT * window) * spec.hidden, flops, engine)

    def check_source(self, original: View) -> None:
        """Raise TsotsallmError where the stage cannot work on a recipe's source."""

    def trained_values(self, spec: ModelSpec) -> int:
        """How many numbers are trained."""
        return 0

    def kept_values(self, spec: ModelSpec, layer: int, *, packed: bool) -> list[int]:
        """How many numbers stay beside each linear of a layer, for those that keep any."""
        return []

    def survey(self, view: View, workplace: Workplace) -> JsonObject:
        """What a stage that must see the whole model before it decides finds out, as plain data."""
        raise RecipeError(f"{self.name} has nothing to survey")

    def prepare(self, view: View, *, sparse: bool) -> Trainee:
        """The model with what is to be trained of it; `sparse` says that its zeros were made on purpose."""
        raise RecipeError(f"{self.name} trains nothing")

    def imitation(self, view: View, original: View, kept: list[int], samples: Samples, directory: Path,
                  device: torch.device, *, sparse: bool) -> Imitation:
        """Layer by layer: what trains the layers of `view`, which are the layers `kept` of the original."""
        raise RecipeError(f"{self.name} does not train layer by layer")

    def train(self, trainee: Trainee, samples: Sequence[Samples], engine: Engine, state: Path, tick: Tick,
              original: View) -> list[Curve]:
        """Train on all samples, one after another; continues from the files in `state`. `original` began the recipe."""
        return [train(trainee.adapted.tensors(), Predicting(engine, some), self, state / f"{number}.safetensors",
                      tick=tick) for number, some in enumerate(samples)]

    def taught(self, teacher: View, trainee: Trainee, samples: Sequence[Samples], engine: Engine, state: Path, tick: Tick, *,
               top: int, temperature: float = 1.0, whole: bool = False) -> list[Curve]:
        """Train on a teacher's tokens, read once for the samples that training sees; continues from the files in `state`."""
        curves = []
        for number, some in enumerate(samples):
            some = replace(some, training=some.training.first(self.steps * self.batch))
            tokens = TeacherTokens(teacher, some, top, temperature, state / f"teacher-{number}.safetensors",
                                   engine.device, tick, whole=whole)
            curves.append(train(trainee.adapted.tensors(), Predicting(engine, some, tokens), self,
                                state / f"{number}.safetensors", tick=tick))
        return curves

    def tokens_a_step(self, spec: ModelSpec) -> int:
        """Tokens in a batch."""
        return self.batch * min(self.window, spec.context)

    def read(self, codec: TextCodec, spec: ModelSpec, text: str | None, source: str) -> list[Samples]:
        """All samples, read and checked before anything starts; `text` is the recipe's own, from `source`."""
        if not self.sources:
            assert text is not None
            windows = text_windows(text, codec, min(self.window, spec.context), source)
            return [split(windows, self.held_out, self.seed)]
        for name in self.sources:
            if name != name.strip() or not name:
                raise CorpusError(f"{self.name}.data names {name!r}, which is no file")
        return [read_samples(name, codec, spec, self.window, self.held_out, self.seed) for name in self.sources]


def module_names(targets: Sequence[str], known: list[str], where: str) -> list[str]:
    """The linears of a layer that short names mean: q, k, v, o, gate, up, down; full names; or all.

    Where several are one, each of their names means it.
    """
    from tsotsallm.errors import nearest

    if list(targets) == ["all"]:
        return list(known)
    by_short = {name.rpartition(".")[2].removesuffix("_proj"): name for name in known}
    for name in FUSED.keys() & set(known):
        by_short |= {part.rpartition(".")[2].removesuffix("_proj"): name for part in FUSED[name]}
    found = []
    for target in targets:
        match = [name for name in known if target in (name, name.rpartition(".")[2])] or (
            [by_short[target]] if target in by_short else [])
        if not match:
            raise RecipeError(f"{where} names {quoted(target)}, which is no linear of a layer"
                              f"{nearest(str(target), [*by_short, 'all'])}")
        found += match
    return [name for name in known if name in found]
