"""Pictures of what happens inside a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from tsotsallm.analysis.analyze import Analysis, Drawn, Format
from tsotsallm.analysis.analyze import analyze as draw
from tsotsallm.api.evaluate import text_and_source
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.compression import check_device
from tsotsallm.errors import CheckpointError
from tsotsallm.evaluation.options import RunKeywords, RunOptions
from tsotsallm.records import amended
from tsotsallm.streaming import corpus as texts

WORLD_CHARACTERS = 100_000
"""Characters of the embedded world's test text that a model is analysed on."""


@dataclass(frozen=True)
class AnalysisOptions(RunOptions):
    """What an analysis draws, and on how much text.

    layers, heads    numbers from 0, or from the end: -1; None draws the first and the last layer, the first eight heads
    tokens           tokens at the beginning of the text whose attention and states are drawn
    windows, window  number and length in tokens of the windows that importance and outliers are measured on, drawn by `seed`
    picture          "png" or "svg"
    """

    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    tokens: int = 256
    windows: int = 16
    window: int = 256
    seed: int = 0
    picture: Format = "png"


class AnalysisKeywords(RunKeywords, total=False):
    """The fields of AnalysisOptions, as keywords."""

    layers: Sequence[int] | None
    heads: Sequence[int] | None
    tokens: int
    windows: int
    window: int
    seed: int
    picture: Format


def analyze(model: str | Path, text: str | Path | None, out: str | Path, *, reference: str | Path | None = None,
            options: AnalysisOptions | None = None, **keywords: Unpack[AnalysisKeywords]) -> Analysis:
    """Draw attention, hidden states, layer importance and outliers of a model, beside its original where one is given.

    Pictures and analysis.json go to `out`. More options are fields of AnalysisOptions, or keywords.
    Raises CheckpointError where the original's tokenizer splits the text differently.
    """
    options = amended(options or AnalysisOptions(), keywords, analyze)
    content, source = text_and_source(text, (model, reference), WORLD_CHARACTERS)
    checkpoint = Checkpoint.open(model)
    codec, beginning = checkpoint.codec, content[:20 * options.tokens]
    models = {"model": View.of(checkpoint)}
    ids = codec.encode(beginning)[:min(options.tokens, checkpoint.spec.context)]
    if reference is not None:
        original = Checkpoint.open(reference)
        if original.codec.encode(beginning)[:len(ids)] != ids:
            raise CheckpointError(f"{reference} splits the text differently from {model}: their pictures do not compare")
        models["original"] = View.of(original)
    window = min(options.window, checkpoint.spec.context, len(codec.encode(content[:20 * options.window])))
    corpus = texts.calibration(content, codec, windows=options.windows, length=window, seed=options.seed, source=source)
    drawn = Drawn(options.layers, options.heads, options.picture)
    return draw(models, ids, corpus, Path(out), drawn, replace(options, device=check_device(options.device)))
