"""Settings, units and files of small fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tsotsallm.checkpoint.gguf_layout import vocabulary_entries
from tsotsallm.checkpoint.gguf_vocabulary import read_vocabulary
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.fit.files import Files
from tsotsallm.fit.plans import Measured
from tsotsallm.fit.reach import Settings
from tsotsallm.planning import whole_spec
from tsotsallm.stages.allocation import candidates


def settings(text: Path, **more: Any) -> Settings:
    return Settings(str(text), windows=4, window=32, compared=8, **more)


def units(spec: Any) -> Measured:
    """Losses of units that fall with bits, as measured ones do."""
    torch.manual_seed(1)
    shapes = {f"{layer}.{name}": shape for layer in range(spec.layers) for name, shape in linear_shapes(spec, layer).items()}
    shapes["model.embed_tokens"] = (spec.vocabulary, spec.hidden)
    grids = {key: {grid.type: float(torch.rand(())) * 4.0 ** -grid.bits_per_weight for grid in candidates(shape[1])}
             for key, shape in shapes.items()}
    return Measured((1, 0), (0.0, 0.004, 0.05), {0.0: 0.0, 0.25: 0.002}, grids)


def files(model: Path) -> Files:
    """The files of candidates that keep all tokens."""
    checkpoint = Checkpoint.open(model)
    entries = tuple(vocabulary_entries(read_vocabulary(checkpoint.codec)))
    return Files(whole_spec(checkpoint), lambda _size: entries, model.name)
