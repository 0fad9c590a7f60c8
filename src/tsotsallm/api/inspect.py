"""What a model consists of."""

from __future__ import annotations

from pathlib import Path

from tsotsallm.checkpoint.gguf_place import gguf_path
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.inspection import Anatomy, FileAnatomy, inspect_checkpoint, inspect_file


def inspect(model: str | Path) -> Anatomy | FileAnatomy:
    """Anatomy of a checkpoint or a GGUF file: widths, parameters, bytes by part, cache and work per token."""
    file = gguf_path(model)
    if file is not None:
        return inspect_file(file)
    return inspect_checkpoint(Checkpoint.open(model))
