"""What a model consists of."""

from __future__ import annotations

from pathlib import Path

from tsotsallm.checkpoint.gguf_file import begins_as_gguf
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.inspection import Anatomy, FileAnatomy, inspect_checkpoint, inspect_file


def inspect(model: str | Path) -> Anatomy | FileAnatomy:
    """Anatomy of a checkpoint or a GGUF file: widths, parameters, bytes by part, cache and work per token."""
    path = Path(model)
    if not path.is_dir() and (path.suffix == ".gguf" or begins_as_gguf(path)):
        return inspect_file(path)
    return inspect_checkpoint(Checkpoint.open(model))
