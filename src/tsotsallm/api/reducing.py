"""Make a model smaller; look at one; load one."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

from tsotsallm import compression
from tsotsallm.analysis import pictures
from tsotsallm.checkpoint.gguf_file import begins_as_gguf
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.compression import check_device
from tsotsallm.errors import MissingExtraError
from tsotsallm.inspection import Anatomy, FileAnatomy, inspect_checkpoint, inspect_file
from tsotsallm.run.run import Result

Given = ParamSpec("Given")


def _draw(out: Path) -> None:
    """A picture beside the curve of every training and beside every decision; without matplotlib the numbers alone."""
    try:
        for path in sorted(out.glob("training-*.json")):
            pictures.training_curve(json.loads(path.read_text("utf-8")), path.with_suffix(".png"))
        for path in sorted(out.glob("decision-*.json")):
            decision = json.loads(path.read_text("utf-8"))
            draw = next((kind for key, kind in (("ranks", pictures.ranks), ("grids", pictures.grids)) if key in decision),
                        pictures.selection)
            draw(decision, path.with_suffix(".png"))
    except MissingExtraError:
        return


def _drawn(compress: Callable[Given, Result]) -> Callable[Given, Result]:
    """The same, with pictures of what was learned and decided in the result."""
    @functools.wraps(compress)
    def drawn(*args: Given.args, **settings: Given.kwargs) -> Result:
        result = compress(*args, **settings)
        _draw(result.path)
        return result
    return drawn


compress = _drawn(compression.compress)


def inspect(model: str | Path) -> Anatomy | FileAnatomy:
    """Anatomy of a checkpoint or a GGUF file: widths, parameters, bytes by part, cache and work per token."""
    path = Path(model)
    if not path.is_dir() and (path.suffix == ".gguf" or begins_as_gguf(path)):
        return inspect_file(path)
    return inspect_checkpoint(Checkpoint.open(model))


def load(model: str | Path, *, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any]:
    """A checkpoint, ours included, as a transformers model and its tokenizer."""
    import torch

    from tsotsallm.engine.resident import resident

    checkpoint = Checkpoint.open(model)
    return resident(checkpoint, getattr(torch, dtype), check_device(device)), checkpoint.tokenizer()
