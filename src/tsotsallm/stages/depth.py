"""Depth pruning: remove the layers that matter least."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import RecipeError
from tsotsallm.files import Json, JsonObject
from tsotsallm.stages.contract import Choice, LayerChoice, Model, Needs, Protect, Short, Workplace, whole_number
from tsotsallm.stages.costs import Conditions, Cost, activation_bytes, forward_flops, widest_layer_bytes
from tsotsallm.streaming.backward import backward_sweep
from tsotsallm.streaming.hidden import BATCH_TOKENS
from tsotsallm.streaming.score import leave_one_out_losses
from tsotsallm.streaming.sweep import TwoStates, embed_corpus, sweep
from tsotsallm.validation import Natural

HEAD_ROWS = 8192
"""Rows of the head that are in memory at a time."""
WHOLE = -1
"""Stands in the place of a layer for the model with all its layers."""


def _short(values: list[str]) -> JsonObject:
    return {"remove": whole_number(values[0], "depth")} | ({"importance": values[1]} if len(values) == 2 else {})


@dataclass(frozen=True)
class Depth(LayerChoice):
    """Remove the `remove` least important layers (Shortened LLaMA, arXiv:2402.02834; ShortGPT, arXiv:2403.03853).

    remove      how many layers go
    importance  perplexity: of the model without the layer; taylor: Σ|w·∂L/∂w| over its linears; magnitude: Σ|w|;
                cosine: 1 − mean cos(input, output) over tokens
    iterative   measure again after every removed layer
    """

    name: ClassVar[str] = "depth"
    shorts: ClassVar[dict[str, Short]] = {"depth": Short(_short, "depth:N or depth:N:importance", 2)}
    remove: Natural = 1
    importance: Literal["perplexity", "taylor", "magnitude", "cosine"] = "perplexity"
    protect: Protect = field(default_factory=lambda: Protect(4, 2))
    iterative: bool = False

    @property
    def measured_by(self) -> list[Json]:
        """Everything but how many layers go: the importances are the same."""
        return [self.name, self.fields() | {"remove": None}]

    def short(self) -> str:
        """`depth:N` or `depth:N:importance`."""
        return f"depth:{self.remove}" + ("" if self.importance == "perplexity" else f":{self.importance}")

    @property
    def needs(self) -> Needs:
        """Text, unless magnitudes decide or nothing is removed."""
        return Needs(text=self.importance != "magnitude" and self.remove > 0)

    def without_text(self) -> Depth:
        """The same by the magnitude of the weights."""
        return replace(self, importance="magnitude")

    def check(self, model: Model) -> None:
        """Raise RecipeError where fewer layers can go than are asked for."""
        spec = model.spec
        free = len(self.protect.open_layers(spec.layers))
        if self.remove > free or self.remove >= spec.layers:
            raise RecipeError(f"depth removes {self.remove} of {spec.layers} layers, but with the first "
                              f"{self.protect.first} and last {self.protect.last} protected only {max(free, 0)} can go; "
                              "remove fewer or protect less")

    def remarks(self, model: Model) -> list[str]:
        """What is not known of removing layers where a norm stands behind every branch."""
        spec = model.spec
        if not spec.traits.behind:
            return []
        return [f"in {spec.family} a norm stands behind every branch; the sources of depth (arXiv:2402.02834, 2403.03853) "
                "removed layers from models without such norms, and no result for others is known: evaluate the model, and "
                "retrain it with adapt or distill"]

    def layers_after(self, layers: int) -> int:
        """All but those that go."""
        return layers - self.remove

    def forecast(self, model: Model, conditions: Conditions) -> Cost:
        """The cost of measuring the importance, `iterative` ones after every removed layer again."""
        if self.remove == 0:
            return Cost()
        spec, tokens, window = model.spec, conditions.tokens, conditions.window
        layer_bytes, state_bytes = widest_layer_bytes(spec), 4 * tokens * spec.hidden
        candidates = self.protect.open_layers(spec.layers)
        rounds = self.remove if self.iterative else 1
        head_flops = 2.0 * tokens * spec.vocabulary * spec.hidden
        forward = [forward_flops(spec, layer, tokens, window) for layer in range(spec.layers)]
        ram = int(layer_bytes * 1.25) + activation_bytes(spec, window) + 4 * HEAD_ROWS * (spec.hidden + 2 * BATCH_TOKENS)
        if self.importance == "magnitude":
            return Cost(layer_bytes)
        if self.importance == "cosine":
            return Cost(ram, 2 * state_bytes, rounds * 2 * sum(forward))
        if self.importance == "taylor":
            return Cost(ram + layer_bytes, (spec.layers + 3) * state_bytes, rounds * (4 * sum(forward) + 3 * head_flops))
        branches = [sum(candidate < layer for candidate in candidates) for layer in range(spec.layers)]
        flops = sum(cost * (1 + count) for cost, count in zip(forward, branches, strict=True))
        return Cost(ram, (2 + len(candidates)) * state_bytes, rounds * (flops + (1 + len(candidates)) * head_flops))

    def visits(self, model: Model) -> int:
        """One sweep for every round, or one forward and one back."""
        rounds = 0 if self.remove == 0 else self.remove if self.iterative else 1
        return rounds * (2 if self.importance == "taylor" else 1)

    def choose(self, view: View, workplace: Workplace) -> Choice:
        """The layers that stay, with the importance of every candidate in every round.

        By perplexity, `whole` is that of the round's model with all its layers, which the importances compare with.
        """
        kept = list(range(view.spec.layers))
        candidates = self.protect.open_layers(len(kept))
        rounds: list[JsonObject] = []
        while len(kept) > view.spec.layers - self.remove:
            places = [kept.index(layer) for layer in candidates]
            work = replace(workplace, scratch=workplace.scratch / f"round-{len(rounds)}")
            scores = self._scores(view.reordered(kept), places, work, f"round {len(rounds)}, layer ")
            whole = {"whole": scores.pop(WHOLE)} if WHOLE in scores else {}
            ranked = sorted((score, kept[place]) for place, score in scores.items())
            going = [layer for _, layer in ranked[:1 if self.iterative else self.remove]]
            rounds.append({"importance": {str(kept[place]): score for place, score in sorted(scores.items())},
                           "removed": going} | whole)
            kept = [layer for layer in kept if layer not in going]
            candidates = [layer for layer in candidates if layer not in going]
        return Choice(kept, {"rounds": rounds})

    def _scores(self, view: View, candidates: list[int], work: Workplace, note: str) -> dict[int, float]:
        """The importance of every candidate; what an interrupted attempt measured is not measured again.

        By perplexity, that of the whole view is among them under WHOLE.
        """
        wanted = [WHOLE] * (self.importance == "perplexity") + candidates
        scores = {int(key.removeprefix(note)): value for key, value in work.noted.items() if key.startswith(note)}
        if not scores.keys() >= set(wanted):
            for layer, score in IMPORTANCES[self.importance](view, candidates, work, dict(scores)):
                scores[layer] = score
                work.note(f"{note}{layer}", score)
        if work.scratch.exists():
            shutil.rmtree(work.scratch)
        return {layer: scores[layer] for layer in wanted}


Scores = Iterator[tuple[int, float]]


def _perplexity(view: View, candidates: list[int], work: Workplace, _known: dict[int, float]) -> Scores:
    whole, losses = leave_one_out_losses(view, work.text("depth"), candidates, work.scratch, work.device, work.tick)
    for layer, loss in {WHOLE: whole, **losses}.items():
        yield layer, math.exp(loss)


def _taylor(view: View, candidates: list[int], work: Workplace, _known: dict[int, float]) -> Scores:
    for index, gradients in backward_sweep(view, work.text("depth"), work.scratch, work.device, work.tick):
        yield index, sum(float((weight * gradient).abs().sum(dtype=torch.float64))
                         for weight, gradient in gradients.values() if weight.ndim == 2)


def _magnitude(view: View, candidates: list[int], work: Workplace, _known: dict[int, float]) -> Scores:
    for index in candidates:
        names = linear_shapes(view.spec, index)
        yield index, sum(float(view.layer_tensor(index, f"{name}.weight").abs().sum(dtype=torch.float64))
                         for name in names)
        work.tick("measuring", (index + 1) / view.spec.layers)


@torch.no_grad()
def _cosine(view: View, candidates: list[int], work: Workplace, known: dict[int, float]) -> Scores:
    corpus = work.text("depth")
    states = TwoStates(work.scratch, [len(window) for window in corpus.windows], view.spec.hidden)
    start = len(known) if states.inputs_of(len(known)).exists() else 0
    if start == 0:
        embed_corpus(view, corpus, states.inputs_of(0))
    measured: dict[int, float] = {}
    for visit in sweep(view, states, observe=False, device=work.device, start=start):
        yield from measured.items()     # the layer before this one: its outputs are on disk now
        work.tick("measuring", visit.index / view.spec.layers)
        inputs = visit.inputs
        assert inputs is not None
        total = torch.zeros((), dtype=torch.float64)
        for batch in inputs.batches():
            before = inputs.read(batch)
            after = visit.frame(before).cpu()
            total += torch.cosine_similarity(before, after, dim=-1).sum(dtype=torch.float64)
        measured = {visit.index: 1 - float(total) / inputs.tokens}
    yield from measured.items()
    states.remove()


IMPORTANCES: dict[str, Callable[[View, list[int], Workplace, dict[int, float]], Scores]] = {
    "perplexity": _perplexity, "taylor": _taylor, "magnitude": _magnitude, "cosine": _cosine}
"""Importance metric -> (layer, importance) of a view's layers; what an interrupted attempt knows is given to it.

Perplexity gives that of the view with all its layers too, as layer WHOLE.
"""
