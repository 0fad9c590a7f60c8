"""A run of layers replaced by one linear map, fitted in closed form and merged into the layer before it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import NumericsError, RecipeError
from tsotsallm.files import Json, JsonObject
from tsotsallm.stages.contract import (
    Choice,
    LayerEdit,
    LayerFile,
    Model,
    Needs,
    Protect,
    Short,
    Workplace,
    whole_number,
)
from tsotsallm.stages.costs import Conditions, Cost, activation_bytes, dense_bytes, forward_flops, widest_layer_bytes
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.frame import Frame
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.score import final_states, token_losses
from tsotsallm.streaming.sweep import Visit, embed_corpus
from tsotsallm.validation import Count, NotNegative

WRITER = "mlp.down_proj"
HELD_OUT = 0.25
"""Share of the text on which `damp` is chosen, at the end."""
DAMPS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, math.inf)


def _short(values: list[str]) -> JsonObject:
    return {"remove": whole_number(values[0], "replace")} | ({"importance": values[1]} if len(values) == 2 else {})


@dataclass(frozen=True)
class Replace(LayerEdit):
    """Remove `remove` neighbouring layers and let one linear map stand for them (ReplaceMe, arXiv:2505.02819).

    With M what the feed-forward of the layer before the run adds, L that layer's output and L⁺ the output of the run's last
    layer, all on calibration tokens, the map T minimises Σ ‖M·T + (L − M) − L⁺‖² / ‖L⁺‖² + λ·‖T − I‖² (eq. 4 of the paper,
    where every token counts alike, so that the few with huge states decide alone, and where the ridge draws T to zero;
    here it draws T to the identity, which is plain removal). T is merged into that layer's `down_proj`: no parameter is
    added and nothing is trained.

    remove      how many neighbouring layers go
    importance  which run: cosine: the one whose output is nearest to its input, by the mean of 1 − cos over tokens;
                perplexity: the one without which the model's perplexity is lowest before the map is fitted
    protect     layers at either end that stay; the first layer always does, since the map needs a layer before the run
    damp        λ as a share of the mean weighted square of M's columns; by default the one of 0.01 to 30, or plain removal,
                that has the least error on the last quarter of the text when it is fitted on the rest
    """

    name: ClassVar[str] = "replace"
    shorts: ClassVar[dict[str, Short]] = {"replace": Short(_short, "replace:N or replace:N:importance", 2)}
    remove: Count = 1
    importance: Literal["cosine", "perplexity"] = "cosine"
    protect: Protect = field(default_factory=lambda: Protect(1, 1))
    damp: NotNegative | None = None

    def short(self) -> str:
        """`replace:N` or `replace:N:importance`."""
        return f"replace:{self.remove}" + ("" if self.importance == "cosine" else f":{self.importance}")

    @property
    def measured_by(self) -> list[Json]:
        """Everything but the damping of the map: the scores of the runs are the same."""
        return [self.name, self.fields() | {"damp": None}]

    @property
    def needs(self) -> Needs:
        """Text."""
        return Needs(text=True)

    def starts(self, layers: int) -> list[int]:
        """The layers at which a run may begin, in a model of `layers`."""
        return list(range(max(1, self.protect.first), layers - self.protect.last - self.remove + 1))

    def check(self, model: Model) -> None:
        """Raise RecipeError where no run of that length may go."""
        super().check(model)
        layers = model.spec.layers
        if WRITER in model.spec.traits.behind:
            raise RecipeError(f"replace merges a linear map into {WRITER}, but in a {model.spec.family} a norm follows it "
                              f"({model.spec.traits.behind[WRITER]}), which no map before it can undo; remove layers with "
                              f"depth:{self.remove}, and retrain with adapt or distill")
        if not self.starts(layers):
            most = max(0, layers - self.protect.last - max(1, self.protect.first))
            raise RecipeError(f"replace removes {self.remove} of {layers} layers, but with the first "
                              f"{max(1, self.protect.first)} and last {self.protect.last} protected at most {most} can go; "
                              "remove fewer or protect less")

    def shape(self, model: Model) -> Model:
        """The model without a run of layers; the layers with the fewest bytes count as the ones that go."""
        smallest = sorted(range(len(model.layers)), key=lambda index: model.layers[index].size)[:self.remove]
        left = [layer for index, layer in enumerate(model.layers) if index not in smallest]
        # which layer takes the map is not known: every one may be stored dense
        sizes = [max(layer.size, dense_bytes(model.spec, 0, model.element)) for layer in left]
        return replace(super().shape(model), spec=self.spec_after(model.spec.with_layers(len(left))), layers=tuple(
            LayerFile(layer.source, size) for layer, size in zip(left, sizes, strict=True)))

    def forecast(self, model: Model, conditions: Conditions) -> Cost:
        """Runs of the corpus through the model to choose and to fit, and the least-squares answer."""
        spec, tokens = model.spec, conditions.tokens
        forward = sum(forward_flops(spec, layer, tokens, conditions.window) for layer in range(spec.layers))
        head = 2.0 * tokens * spec.vocabulary * spec.hidden
        tries = len(self.starts(spec.layers)) if self.importance == "perplexity" else 1
        ram = int(1.25 * widest_layer_bytes(spec)) + activation_bytes(spec, conditions.window) + 4 * 4 * spec.hidden ** 2
        flops = (tries + 1) * forward + (tries * head if self.importance == "perplexity" else 0.0) \
            + 4.0 * tokens * spec.hidden ** 2 + spec.hidden ** 3
        return Cost(ram, (spec.layers + 2) * 4 * tokens * spec.hidden, flops)

    def choose(self, view: View, workplace: Workplace) -> Choice:
        """The layers that stay, with the score of every run."""
        starts = self.starts(view.spec.layers)
        scores = {int(key): value for key, value in workplace.noted.items()}
        if not scores.keys() >= set(starts):
            measure = _distances if self.importance == "cosine" else _perplexities
            for start, score in measure(view, [one for one in starts if one not in scores], self.remove, workplace):
                scores[start] = score
                workplace.note(str(start), score)
        first = min(starts, key=lambda start: (scores[start], start))
        order = [layer for layer in range(view.spec.layers) if not first <= layer < first + self.remove]
        return Choice(order, {"importance": {str(start): scores[start] for start in starts}, "first": first,
                              "removed": list(range(first, first + self.remove))})

    def prepare(self, view: View, order: Sequence[int], workplace: Workplace) -> tuple[int, Tensor]:
        """The layer that takes the map, and the map T, (hidden, hidden) float32."""
        first = next((place for place, layer in enumerate(order) if layer != place), len(order))
        states = _EveryLayer(workplace.scratch, workplace.text(self.name), view.spec)
        written = states.beside("feed-forward")
        states.fill(view, first + self.remove, workplace, {first - 1: written})
        fitted, held_out = _Squares(view.spec.hidden), _Squares(view.spec.hidden)
        left = int(written.tokens * (1 - HELD_OUT))
        for batch in written.batches():
            output, before, after = (file.read(batch).reshape(-1, view.spec.hidden) for file in (
                written, states.inputs_of(first), states.inputs_of(first + self.remove)))
            for part, rows in ((fitted, slice(left)), (held_out, slice(left, None))):
                part.add(output[rows], (after - before + output)[rows], after[rows])
            left = max(0, left - len(output))
        states.remove()
        where = f"layer {first - 1}"
        damp = self.damp
        if damp is None:
            damp = min(DAMPS, key=lambda damp: held_out.error(fitted.map(damp, where)))
        return first - 1, (fitted + held_out).map(damp, where).float()

    def reshape(self, visit: Visit, spec: ModelSpec, prepared: tuple[int, Tensor]) -> dict[str, Tensor] | None:
        """The layer before the run with the map in its `down_proj`; None for all others."""
        place, fitted = prepared
        if visit.index != place:
            return None
        layer = {name: tensor.detach() for name, tensor in visit.frame.layer.state_dict().items()}
        fitted = fitted.to(layer[f"{WRITER}.weight"])
        layer[f"{WRITER}.weight"] = fitted.mT @ layer[f"{WRITER}.weight"]
        if f"{WRITER}.bias" in layer:
            layer[f"{WRITER}.bias"] = layer[f"{WRITER}.bias"] @ fitted
        return {name: tensor.to(visit.storage).contiguous() for name, tensor in layer.items()}


class _Squares:
    """The sums of which a weighted least-squares map follows: ΣMᵀM and ΣMᵀB, both (hidden, hidden) float64."""

    def __init__(self, hidden: int) -> None:
        self.gram = torch.zeros(hidden, hidden, dtype=torch.float64)
        self.wanted = torch.zeros_like(self.gram)

    def __add__(self, other: _Squares) -> _Squares:
        both = _Squares(len(self.gram))
        both.gram, both.wanted = self.gram + other.gram, self.wanted + other.wanted
        return both

    def add(self, inputs: Tensor, outputs: Tensor, states: Tensor) -> None:
        """Add tokens, each (tokens, hidden): a norm follows, so that each counts by its error relative to its state."""
        weighted = inputs / states.square().mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        self.gram += (weighted.mT @ inputs).double()
        self.wanted += (weighted.mT @ outputs).double()

    def error(self, fitted: Tensor) -> float:
        """‖M·T − B‖² of these tokens, less ‖B‖²."""
        return float((fitted * (self.gram @ fitted - 2 * self.wanted)).sum())

    def map(self, damp: float, where: str) -> Tensor:
        """The map with a ridge towards the identity, float64; infinity gives the identity."""
        if math.isinf(damp):
            return torch.eye(len(self.gram), dtype=torch.float64)
        return fitted_map(self.gram, self.wanted, damp, where)


def fitted_map(gram: Tensor, wanted: Tensor, damp: float, where: str) -> Tensor:
    """T of ‖M·T − B‖² + λ·‖T − I‖², given MᵀM and MᵀB, both (hidden, hidden) float64; float64.

    Raises NumericsError where MᵀM + λ·I is not positive definite.
    """
    ridge = damp * float(gram.diagonal().mean())
    eye = torch.eye(len(gram), dtype=gram.dtype)
    factor, info = torch.linalg.cholesky_ex(gram + ridge * eye)
    if int(info):
        raise NumericsError(f"{where}: the Gram of {len(gram)} feed-forward outputs is not positive definite with damp "
                            f"{damp:g}; raise damp, or calibrate on more text")
    return torch.cholesky_solve(wanted + ridge * eye, factor)


class _EveryLayer:
    """The inputs of every layer, each in a file of its own; the outputs of the last are the inputs of one more."""

    def __init__(self, directory: Path, corpus: Corpus, spec: ModelSpec) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.corpus, self.spec = directory, corpus, spec

    def beside(self, name: str) -> HiddenStates:
        """A file of the same shape."""
        lengths = [len(window) for window in self.corpus.windows]
        return HiddenStates(self.directory / f"{name}.f32", lengths, self.spec.hidden)

    def inputs_of(self, layer: int) -> HiddenStates:
        """The inputs of a layer, (windows, tokens, hidden) float32."""
        return self.beside(f"layer-{layer}")

    @torch.no_grad()
    def fill(self, view: View, layers: int, workplace: Workplace, written: dict[int, HiddenStates]) -> None:
        """Run the corpus through the first `layers` layers; `written` takes feed-forward outputs of the layers it names."""
        embed_corpus(view, self.corpus, self.inputs_of(0))
        frame = Frame(view.spec, workplace.device)
        for index in range(layers):
            frame.load(index, view.layer(index))
            seen: list[Tensor] = []
            hook = frame.layer.get_submodule("mlp").register_forward_hook(
                lambda _module, _inputs, output, seen=seen: seen.append(output))
            before, after = self.inputs_of(index), self.inputs_of(index + 1)
            for batch in before.batches():
                seen.clear()
                after.write(batch, frame(before.read(batch)))
                if index in written:
                    written[index].write(batch, seen[0] * view.spec.residual_scale)
            hook.remove()
            workplace.tick("measuring", (index + 1) / layers)
        frame.clear()

    def remove(self) -> None:
        """Delete all files."""
        shutil.rmtree(self.directory, ignore_errors=True)


@torch.no_grad()
def _distances(view: View, starts: Sequence[int], count: int, workplace: Workplace) -> Iterator[tuple[int, float]]:
    """Mean of 1 − cos between the input of the first layer and the output of the last of each run."""
    states = _EveryLayer(workplace.scratch, workplace.text("replace"), view.spec)
    states.fill(view, max(starts) + count, workplace, {})
    for start in starts:
        before, after = states.inputs_of(start), states.inputs_of(start + count)
        total = sum(float(torch.cosine_similarity(before.read(batch), after.read(batch), dim=-1).sum(dtype=torch.float64))
                    for batch in before.batches())
        yield start, 1 - total / before.tokens
    states.remove()


@torch.no_grad()
def _perplexities(view: View, starts: Sequence[int], count: int, workplace: Workplace) -> Iterator[tuple[int, float]]:
    """Perplexity of the model without each run."""
    corpus = workplace.text("replace")
    for start in starts:
        left = view.reordered([layer for layer in range(view.spec.layers) if not start <= layer < start + count])
        states = final_states(left, corpus, workplace.scratch / "final.f32", workplace.device, workplace.tick)
        yield start, math.exp(float(token_losses(left, [states], corpus, workplace.device).mean()))
        states.remove()
