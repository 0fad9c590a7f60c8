"""The importance of every layer by each metric, and outliers of weights and activations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from tsotsallm.checkpoint.shapes import input_groups
from tsotsallm.checkpoint.view import View
from tsotsallm.records import Record
from tsotsallm.stages.contract import Workplace
from tsotsallm.stages.depth import IMPORTANCES, WHOLE
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.sweep import Tick, TwoStates, embed_corpus, silent, sweep


def importances(view: View, corpus: Corpus, scratch: Path, device: torch.device,
                tick: Tick = silent) -> tuple[dict[str, list[float]], float]:
    """Metric -> importance of every layer, by which `depth` would rank them; and the perplexity with all layers."""
    layers = list(range(view.spec.layers))
    found, perplexity = {}, math.nan
    for metric, measure in IMPORTANCES.items():
        scores = dict(measure(view, layers, Workplace(corpus, scratch / metric, device, tick), {}))
        found[metric] = [scores[layer] for layer in layers]
        perplexity = scores.get(WHOLE, perplexity)
    return found, perplexity


@dataclass(frozen=True)
class Outliers(Record):
    """How far the largest weights, and the largest channels of the inputs, of one linear stand out.

    `weight_peak` is max|w| over the root mean square, `weight_kurtosis` E[w⁴]/E[w²]² (3 for a normal distribution),
    `input_peak` the largest channel's root mean square over the median channel's.
    """

    layer: int
    linear: str
    weight_peak: float
    weight_kurtosis: float
    input_peak: float


@torch.no_grad()
def outliers(view: View, corpus: Corpus, scratch: Path, device: torch.device, tick: Tick = silent) -> list[Outliers]:
    """Outliers of every linear, from one sweep."""
    states = TwoStates(scratch, [len(window) for window in corpus.windows], view.spec.hidden)
    embed_corpus(view, corpus, states.inputs_of(0))
    peaks = []
    for visit in sweep(view, states, observe=True, device=device):
        tick("finding outliers", visit.index / view.spec.layers)
        for group in input_groups(visit.names):
            norms = visit.gram_of(group[0]).norms
            peak = float(norms.max() / norms.median().clamp(min=torch.finfo(torch.float32).tiny))
            for name in group:
                weight = visit.linear(name).reference
                square = weight.square().mean()
                peaks.append(Outliers(visit.index, name, float(weight.abs().max() / square.sqrt()),
                                      float((weight / square.sqrt()).pow(4).mean()), peak))
    states.remove()
    return peaks
