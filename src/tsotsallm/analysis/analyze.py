"""A view inside models: numbers in one JSON file, and the pictures drawn from them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tsotsallm.analysis import pictures
from tsotsallm.analysis.attention import Inside, attention_spectrum, look_inside, state_spectrum
from tsotsallm.analysis.layers import importances, outliers
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import CorpusError, TsotsallmError
from tsotsallm.evaluation.options import RunOptions
from tsotsallm.inspection import layer_map
from tsotsallm.streaming.corpus import Corpus

Format = Literal["png", "svg"]
Measured = dict[str, tuple[dict[str, list[float]], float]]
"""Model -> importance of its layers by metric, and its perplexity with all of them."""


@dataclass(frozen=True)
class Analysis:
    """The files that were written, and the numbers."""

    files: tuple[Path, ...]
    numbers: dict[str, object]

    def plain(self) -> dict[str, object]:
        """Files and numbers, as JSON takes them."""
        return {"files": [str(path) for path in self.files], **self.numbers}


@dataclass(frozen=True)
class Drawn:
    """What is drawn: layers (None: the first and the last), heads (None: the first eight), the format of the pictures."""

    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    picture: Format = "png"


def analyze(models: dict[str, View], ids: Sequence[int], corpus: Corpus, out: Path, drawn: Drawn,
            run: RunOptions) -> Analysis:
    """Draw the first of `models`, beside the others where they are given; pictures and analysis.json go to `out`.

    Attention and states are those of the token ids `ids`, 8 or more; importance and outliers are of `corpus`. Outliers are
    those of the first model; its perplexities without a layer are drawn beside the perplexity of the last one, or of
    itself with all layers where it is alone.
    Raises CorpusError where the text is too short, TsotsallmError where the model has no such layer or head.
    """
    layers, heads, device = drawn.layers, drawn.heads, torch.device(run.device)
    pictures.pyplot()
    first, (*_, last) = next(iter(models.values())), models
    if len(ids) < 8:
        raise CorpusError(f"the text has {len(ids)} tokens; spectra need 8 or more")
    chosen = {name: _chosen(layers, view.spec.layers, "layer") if layers else [0, view.spec.layers - 1]
              for name, view in models.items()}
    shown = _chosen(heads, first.spec.heads, "head") if heads else list(range(min(first.spec.heads, pictures.MOST_HEADS)))
    out.mkdir(parents=True, exist_ok=True)
    inside = {name: look_inside(view, ids, chosen[name], device) for name, view in models.items()}
    with tempfile.TemporaryDirectory(dir=run.scratch, ignore_cleanup_errors=True) as folder:
        measured = {name: importances(view, corpus, Path(folder) / str(number), device, run.tick)
                    for number, (name, view) in enumerate(models.items())}
        peaks = outliers(first, corpus, Path(folder), device, run.tick)
    of_attention = {f"{name}, layer {layer}": attention_spectrum(maps.mean(0))
                    for name, inner in inside.items() for layer, maps in inner.attention.items()}
    of_states = {f"{name}, layer {layer}": state_spectrum(states)
                 for name, inner in inside.items() for layer, states in inner.states.items()}
    numbers = {
        "models": {name: str(view.checkpoint.directory) for name, view in models.items()}, "tokens": len(ids),
        "layers": chosen, "heads": shown, "attention": _attention_numbers(inside),
        "attention_spectra": _curves(of_attention), "state_spectra": _curves(of_states),
        **_importance_numbers(measured),
        "outliers": [inner.plain() for inner in peaks],
        "corpus": {"source": corpus.source, "windows": len(corpus.windows), "tokens": corpus.tokens}}
    def file(name: str) -> Path:
        return out / f"{name}.{drawn.picture}"

    files = [
        pictures.attention_maps({name: inner.attention for name, inner in inside.items()}, shown, file("attention")),
        pictures.spectra(_lists(of_attention), "Fourier transform of attention along the keys, mean over heads",
                         file("attention-spectra")),
        pictures.spectra(_lists(of_states), "Fourier transform of hidden states along the tokens, mean over channels",
                         file("state-spectra")),
        pictures.importance({name: by_metric for name, (by_metric, _) in measured.items()}, file("importance"),
                            baseline=measured[last][1], named=last if len(models) > 1 else pictures.ALL_LAYERS,
                            places=_places(models)),
        pictures.outliers(peaks, file("outliers"))]
    path = out / "analysis.json"
    path.write_text(json.dumps(numbers, indent=1), "utf-8")
    return Analysis((*files, path), numbers)


def _chosen(asked: Sequence[int], count: int, what: str) -> list[int]:
    wrong = [index for index in asked if not -count <= index < count]
    if wrong:
        raise TsotsallmError(f"there is no {what} {wrong[0]}; the model has {count}, numbered from 0 (or from the end: -1)")
    return sorted({index % count for index in asked})


def _places(models: dict[str, View]) -> dict[str, Sequence[int]] | None:
    """The last model's layer behind each layer of the first one, where layers were removed or reordered; None elsewhere."""
    views = list(models.values())
    plan, count = layer_map(views[0].checkpoint), views[-1].spec.layers
    if len(views) == 1 or plan.layers != count or list(plan.runs) == list(range(count)):
        return None
    return {name: plan.runs if view is views[0] else range(view.spec.layers) for name, view in models.items()}


def _importance_numbers(measured: Measured) -> dict[str, object]:
    """Importances and perplexity of the first model, and under `beside` those of the others by their names."""
    (by_metric, perplexity), *_ = measured.values()
    others = {name: {"importance": found, "perplexity": value} for name, (found, value) in list(measured.items())[1:]}
    return {"importance": by_metric, "perplexity": perplexity} | ({"beside": others} if others else {})


def _attention_numbers(inside: dict[str, Inside]) -> dict[str, dict[str, object]]:
    """For each model, layer and head: mean entropy in nats, mean distance in tokens, share on the first token."""
    numbers: dict[str, dict[str, object]] = {}
    for name, inner in inside.items():
        for layer, maps in inner.attention.items():
            tokens = maps.shape[-1]
            distance = (torch.arange(tokens)[:, None] - torch.arange(tokens)[None]).clamp(min=0)
            entropy = -(maps * maps.clamp(min=1e-12).log()).sum(-1).mean(-1)
            numbers.setdefault(name, {})[str(layer)] = {
                "entropy": entropy.tolist(), "distance": (maps * distance).sum(-1).mean(-1).tolist(),
                "first_token": maps[:, 1:, 0].mean(-1).tolist()}
    return numbers


def _lists(curves: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, tuple[list[float], list[float]]]:
    return {name: (x.tolist(), y.tolist()) for name, (x, y) in curves.items()}


def _curves(curves: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, dict[str, list[float]]]:
    return {name: {"cycles_per_token": x, "magnitude": y} for name, (x, y) in _lists(curves).items()}
