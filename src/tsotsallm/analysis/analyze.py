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
from tsotsallm.analysis.layers import importances, outliers, perplexity_of
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import CorpusError, TsotsallmError
from tsotsallm.evaluation.options import RunOptions
from tsotsallm.streaming.corpus import Corpus

Format = Literal["png", "svg"]


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

    Attention and states are those of the token ids `ids`, 8 or more; importance and outliers are of `corpus`.
    Raises CorpusError where the text is too short, TsotsallmError where the model has no such layer or head.
    """
    layers, heads, device = drawn.layers, drawn.heads, torch.device(run.device)
    pictures.pyplot()
    first = next(iter(models.values()))
    if len(ids) < 8:
        raise CorpusError(f"the text has {len(ids)} tokens; spectra need 8 or more")
    chosen = {name: _chosen(layers, view.spec.layers, "layer") if layers else [0, view.spec.layers - 1]
              for name, view in models.items()}
    shown = _chosen(heads, first.spec.heads, "head") if heads else list(range(min(first.spec.heads, pictures.MOST_HEADS)))
    out.mkdir(parents=True, exist_ok=True)
    inside = {name: look_inside(view, ids, chosen[name], device) for name, view in models.items()}
    with tempfile.TemporaryDirectory(dir=run.scratch, ignore_cleanup_errors=True) as folder:
        measured = importances(first, corpus, Path(folder), device, run.tick)
        original = perplexity_of(first, corpus, Path(folder), device)
        peaks = outliers(first, corpus, Path(folder), device, run.tick)
    of_attention = {f"{name}, layer {layer}": attention_spectrum(maps.mean(0))
                    for name, inner in inside.items() for layer, maps in inner.attention.items()}
    of_states = {f"{name}, layer {layer}": state_spectrum(states)
                 for name, inner in inside.items() for layer, states in inner.states.items()}
    numbers = {
        "models": {name: str(view.checkpoint.directory) for name, view in models.items()}, "tokens": len(ids),
        "layers": chosen, "heads": shown, "attention": _attention_numbers(inside),
        "attention_spectra": _curves(of_attention), "state_spectra": _curves(of_states), "importance": measured,
        "perplexity": original,
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
        pictures.importance(measured, file("importance"), original=original), pictures.outliers(peaks, file("outliers"))]
    path = out / "analysis.json"
    path.write_text(json.dumps(numbers, indent=1), "utf-8")
    return Analysis((*files, path), numbers)


def _chosen(asked: Sequence[int], count: int, what: str) -> list[int]:
    wrong = [index for index in asked if not -count <= index < count]
    if wrong:
        raise TsotsallmError(f"there is no {what} {wrong[0]}; the model has {count}, numbered from 0 (or from the end: -1)")
    return sorted({index % count for index in asked})


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
